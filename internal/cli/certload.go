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
	"io/fs"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxInput bounds every file that is read whole.
	maxInput     = 4 << 20
	fetchTimeout = 10 * time.Second
)

// tlsOptions are for servers only.
type tlsOptions struct {
	clientCert, clientKey string
	// serverName goes into the handshake instead of the host.
	serverName string
}

func (o *tlsOptions) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.clientCert, "client-cert", "", "PEM certificate to show to a server that asks")
	f.StringVar(&o.clientKey, "client-key", "", "PEM key of --client-cert")
	f.StringVar(&o.serverName, "server-name", "", "server name for the handshake (default: HOST)")
}

func (o tlsOptions) check(source string) error {
	switch {
	case (o.clientCert == "") != (o.clientKey == ""):
		return invalidf("--client-cert and --client-key go together")
	case o != tlsOptions{} && !isServer(source):
		return invalidf("--client-cert, --client-key and --server-name are for HOST:PORT, which %q is not", source)
	}
	return nil
}

// loadCertificates reads the certificates that source names, leaf first.
func (e *env) loadCertificates(ctx context.Context, source string, options tlsOptions) ([]*x509.Certificate, error) {
	if err := options.check(source); err != nil {
		return nil, err
	}
	switch {
	case strings.HasPrefix(source, "unix:"):
		return socketCertificates(ctx, source)
	case source == "-":
		return readCertificates(e.in, "standard input")
	case isServer(source):
		return serverCertificates(ctx, source, options)
	case strings.Contains(source, "://"):
		return nil, invalidf("%q is a URL; give a file, HOST:PORT or unix:SOCKET", source)
	}
	return fileCertificates(source)
}

func fileCertificates(path string) ([]*x509.Certificate, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		hint := "for a server give HOST:PORT"
		if strings.Count(path, ":") > 1 {
			hint = "write an IPv6 server as [ADDRESS]:PORT"
		}
		return nil, invalidf("there is no file %q; %s", path, hint)
	case err == nil && info.IsDir():
		return nil, invalidf("%s is a directory; name a file in it", path)
	case err == nil && info.Mode()&fs.ModeSocket != 0:
		return nil, invalidf("%s is a socket; write unix:%s", path, path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readCertificates(f, path)
}

// isServer holds for HOST:PORT with something on both sides, unless a file is
// called so.
func isServer(source string) bool {
	host, port, err := net.SplitHostPort(source)
	if err != nil || host == "" || port == "" || strings.Contains(source, "/") || strings.HasPrefix(source, "unix:") {
		return false
	}
	_, err = os.Stat(source)
	return err != nil
}

// readBounded reads what a person may have meant to give, and no more.
func readBounded(r io.Reader, name string) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(data) > maxInput {
		return nil, invalidf("%s is larger than %d bytes, which no such file is", name, maxInput)
	}
	return data, nil
}

// readNamedFile reads a file that a flag names.
func readNamedFile(flag, path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, invalidf("%s: there is no file %q", flag, path)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", flag, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, invalidf("%s: %s is a directory; name a file in it", flag, path)
	}
	return readBounded(f, path)
}

// readCertificates reads PEM blocks, or one or more DER certificates.
func readCertificates(r io.Reader, name string) ([]*x509.Certificate, error) {
	data, err := readBounded(r, name)
	if err != nil {
		return nil, err
	}
	return parseCertificates(data, name)
}

func parseCertificates(data []byte, name string) ([]*x509.Certificate, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, invalidf("%s is empty", name)
	}
	if !bytes.Contains(data, []byte("-----BEGIN")) {
		certs, err := x509.ParseCertificates(data)
		if err != nil || len(certs) == 0 {
			return nil, invalidf("%s holds no certificate (neither PEM nor DER)", name)
		}
		return certs, nil
	}
	// Decode passes over what it cannot read; a chain must not lose a link so.
	blocks := bytes.Count(append([]byte("\n"), data...), []byte("\n-----BEGIN "))
	var certs []*x509.Certificate
	var others []string
	n := 0
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		n++
		if block.Type != "CERTIFICATE" {
			others = append(others, block.Type)
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, invalidf("%s: PEM block %d: %w", name, n, err)
		}
		certs = append(certs, cert)
	}
	switch {
	case n < blocks || n == 0:
		return nil, invalidf("%s: a PEM block is cut off or damaged; copy the file again", name)
	case len(certs) == 0:
		return nil, invalidf("%s holds no certificate, but: %s; give the file of the certificate", name, strings.Join(others, ", "))
	}
	return certs, nil
}

// serverCertificates shakes hands with a TLS server for its chain, which is not
// verified here: it is shown to be looked at.
func serverCertificates(ctx context.Context, address string, options tlsOptions) ([]*x509.Certificate, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, invalidf("%q: %w", address, err)
	}
	if _, err := net.DefaultResolver.LookupPort(ctx, "tcp", port); err != nil {
		return nil, invalidf("%q: %q is not a port", address, port)
	}
	cfg := &tls.Config{InsecureSkipVerify: true, ServerName: host, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}} //nolint:gosec // shown, not trusted
	if net.ParseIP(host) != nil {
		cfg.ServerName = ""
	}
	if options.serverName != "" {
		cfg.ServerName = options.serverName
	}
	if options.clientCert != "" {
		pair, err := tls.LoadX509KeyPair(options.clientCert, options.clientKey)
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
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s cannot be reached: %w; is a server listening there?", address, err)
	}
	defer conn.Close()
	err = tls.Client(conn, cfg).HandshakeContext(ctx)
	var plain tls.RecordHeaderError
	switch {
	case len(chain) > 0:
		return chain, nil
	case errors.As(err, &plain):
		return nil, fmt.Errorf("%s speaks no TLS; is it the right port?", address)
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("%s did not answer the TLS handshake within %v; does it speak TLS?", address, fetchTimeout)
	case err == nil:
		err = errors.New("it showed none")
	}
	return nil, fmt.Errorf("no certificate from %s: %w; does it speak TLS, and does it want another --server-name?", address, err)
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
	if err := checkSocket(addr); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	got, err := workloadapi.FetchX509Context(ctx, workloadapi.WithAddr(addr))
	if err != nil {
		return nil, socketError(addr, err)
	}
	return got, nil
}

// checkSocket says what a failed dial would not say as plainly.
func checkSocket(addr string) error {
	path, ok := strings.CutPrefix(addr, "unix://")
	if !ok {
		return nil
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("there is no socket %s; does the agent run, and serve this workload?", path)
	case err != nil:
		return fmt.Errorf("the socket cannot be reached: %w", err)
	case info.Mode()&fs.ModeSocket == 0:
		return invalidf("%s is no socket", path)
	}
	return nil
}

func socketError(addr string, err error) error {
	hint := "does the agent run, and is this user among the socket's uids?"
	switch status.Code(err) {
	case codes.PermissionDenied:
		hint = "the agent holds no identity for this workload; read the agent's log"
	case codes.DeadlineExceeded:
		hint = "the agent has no certificate yet; read the agent's log"
	case codes.Unimplemented:
		hint = "what listens there is no SPIFFE Workload API"
	}
	return fmt.Errorf("no SVID from %s: %w; %s", addr, err, hint)
}

// socketAddress turns a path, unix: or unix:// form into what SPIFFE clients take.
func socketAddress(socket string) (string, error) {
	if strings.HasPrefix(socket, "tcp:") {
		if err := workloadapi.ValidateAddress(socket); err != nil {
			return "", invalidf("--socket %q: %w", socket, err)
		}
		return socket, nil
	}
	path := strings.TrimPrefix(strings.TrimPrefix(socket, "unix:"), "//")
	if path == "" {
		return "", invalidf("no socket given; use --socket or set SPIFFE_ENDPOINT_SOCKET")
	}
	abs, err := absolute(path)
	if err != nil {
		return "", err
	}
	return "unix://" + abs, nil
}
