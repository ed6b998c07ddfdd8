package cli

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

const (
	maxCertFile  = 4 << 20
	fetchTimeout = 10 * time.Second
)

// loadCertificates reads the certificates that source names, leaf first.
func (e *env) loadCertificates(ctx context.Context, source, clientCert, clientKey string) ([]*x509.Certificate, error) {
	if (clientCert == "") != (clientKey == "") {
		return nil, invalidf("--client-cert and --client-key go together")
	}
	if socket, ok := strings.CutPrefix(source, "unix:"); ok {
		return socketCertificates(ctx, socket)
	}
	if source == "-" {
		return readCertificates(e.in, "standard input")
	}
	if _, err := os.Stat(source); err != nil && looksLikeAddress(source) {
		return serverCertificates(ctx, source, clientCert, clientKey)
	}
	return fileCertificates(source)
}

func fileCertificates(path string) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readCertificates(f, path)
}

// looksLikeAddress holds for HOST:PORT with something on both sides.
func looksLikeAddress(s string) bool {
	host, port, err := net.SplitHostPort(s)
	return err == nil && host != "" && port != "" && !strings.Contains(s, "/")
}

// readCertificates reads PEM blocks, or one or more DER certificates.
func readCertificates(r io.Reader, name string) ([]*x509.Certificate, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxCertFile+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(data) > maxCertFile {
		return nil, invalidf("%s is larger than %d bytes", name, maxCertFile)
	}
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		certs, err := x509.ParseCertificates(data)
		if err != nil || len(certs) == 0 {
			return nil, invalidf("%s holds no certificate (neither PEM nor DER)", name)
		}
		return certs, nil
	}
	var certs []*x509.Certificate
	for n := 1; ; n++ {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, invalidf("%s: PEM block %d: %w", name, n, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, invalidf("%s holds no certificate", name)
	}
	return certs, nil
}

// serverCertificates shakes hands with a TLS server for its chain, which is not
// verified here: it is shown to be looked at.
func serverCertificates(ctx context.Context, address, clientCert, clientKey string) ([]*x509.Certificate, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, invalidf("%q: %w", address, err)
	}
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: host, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}} //nolint:gosec // shown, not trusted
	if net.ParseIP(host) != nil {
		cfg.ServerName = ""
	}
	if clientCert != "" {
		pair, err := tls.LoadX509KeyPair(clientCert, clientKey)
		if err != nil {
			return nil, invalidf("--client-cert: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	var chain []*x509.Certificate
	// Kept here, so that a server that refuses us afterwards has shown it already.
	cfg.VerifyConnection = func(cs tls.ConnectionState) error { chain = cs.PeerCertificates; return nil }
	conn, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", address)
	if conn != nil {
		conn.Close()
	}
	if len(chain) > 0 {
		return chain, nil
	}
	if err == nil {
		err = errors.New("it showed no certificate")
	}
	return nil, fmt.Errorf("no certificate from %s: %w; is a TLS server listening there?", address, err)
}

// socketCertificates asks a Workload API for every SVID it gives us.
func socketCertificates(ctx context.Context, socket string) ([]*x509.Certificate, error) {
	svids, err := fetchSVIDs(ctx, socket)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	for _, svid := range svids.SVIDs {
		certs = append(certs, svid.Certificates...)
	}
	return certs, nil
}

// fetchSVIDs makes one call of the Workload API.
func fetchSVIDs(ctx context.Context, socket string) (*workloadapi.X509Context, error) {
	addr, err := socketAddress(socket)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(addr))
	if err != nil {
		return nil, fmt.Errorf("no SVID from %s: %w; does the agent run, and is this user among the socket's uids?", addr, err)
	}
	return got, nil
}

// socketAddress turns a path, unix: or unix:// form into what SPIFFE clients take.
func socketAddress(socket string) (string, error) {
	path := strings.TrimPrefix(strings.TrimPrefix(socket, "unix:"), "//")
	if path == "" {
		return "", invalidf("no socket given; use --socket or set SPIFFE_ENDPOINT_SOCKET")
	}
	if strings.HasPrefix(socket, "tcp:") {
		return socket, nil
	}
	abs, err := absolute(path)
	if err != nil {
		return "", err
	}
	return "unix://" + abs, nil
}
