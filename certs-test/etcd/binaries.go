//go:build binaries

// Package etcd pins the etcd that the test cluster runs. Nothing of it is tested or
// linted here: the module exists to be built by certs-test/tools/parts.
package etcd

import _ "go.etcd.io/etcd/server/v3/etcdmain"
