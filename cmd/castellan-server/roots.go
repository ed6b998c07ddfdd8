package main

// Root certificates to fetch keys of end-user tokens with: an image from scratch has
// no file of them. Where the system has one, or SSL_CERT_FILE names one, that is used.
import _ "golang.org/x/crypto/x509roots/fallback"
