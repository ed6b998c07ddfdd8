// Package pack makes container images of programs without a container engine: one
// layer over nothing, as a tarball that containerd imports, and as an OCI layout
// for several platforms.
//
// The same files give the same bytes, on any machine and on any day: entries are
// sorted, owned by root and of one fixed time, and nothing of the machine goes in.
// It refuses a program that could not start in an image that holds nothing else:
// one for another platform, or one that wants a dynamic loader that is not among
// the image's files. It pushes and pulls nothing.
package pack
