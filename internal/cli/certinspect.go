package cli

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// certView is one certificate as people and programs want to see it.
type certView struct {
	SPIFFEID           string    `json:"spiffeId"`
	Serial             string    `json:"serial"`
	NotBefore          time.Time `json:"notBefore"`
	NotAfter           time.Time `json:"notAfter"`
	SecondsLeft        int64     `json:"secondsLeft"`
	LifeUsedPercent    float64   `json:"lifeUsedPercent"`
	IsCA               bool      `json:"isCA"`
	MaxPathLen         *int      `json:"maxPathLen,omitempty"`
	Subject            string    `json:"subject"`
	Issuer             string    `json:"issuer"`
	SelfSigned         bool      `json:"selfSigned"`
	PublicKey          string    `json:"publicKey"`
	SignatureAlgorithm string    `json:"signatureAlgorithm"`
	KeyUsage           []string  `json:"keyUsage,omitempty"`
	ExtKeyUsage        []string  `json:"extKeyUsage,omitempty"`
	URIs               []string  `json:"uris,omitempty"`
	DNSNames           []string  `json:"dnsNames,omitempty"`
	IPAddresses        []string  `json:"ipAddresses,omitempty"`
	NameConstraints    []string  `json:"nameConstraints,omitempty"`
	SubjectKeyID       string    `json:"subjectKeyId,omitempty"`
	AuthorityKeyID     string    `json:"authorityKeyId,omitempty"`
	SHA256             string    `json:"sha256"`
	// SignedBy is the subject key id or subject of the certificate in this chain whose key signed it; empty where it is not here.
	SignedBy string `json:"signedBy,omitempty"`

	issuerIndex int
	state       string
	commonName  string
}

func describeChain(certs []*x509.Certificate, now time.Time) []certView {
	views := make([]certView, len(certs))
	for i, c := range certs {
		views[i] = describe(c, now)
		views[i].issuerIndex = -1
		views[i].SelfSigned = selfSigned(c)
		for j, parent := range certs {
			if c.CheckSignatureFrom(parent) == nil {
				views[i].SignedBy = nameOf(parent)
				if i != j {
					views[i].issuerIndex = j
				}
				break
			}
		}
	}
	return views
}

func describe(c *x509.Certificate, now time.Time) certView {
	v := certView{
		Serial:             fmt.Sprintf("%x", c.SerialNumber),
		NotBefore:          c.NotBefore.UTC(),
		NotAfter:           c.NotAfter.UTC(),
		SecondsLeft:        int64(c.NotAfter.Sub(now).Seconds()),
		LifeUsedPercent:    lifeUsed(c, now),
		IsCA:               c.IsCA,
		Subject:            c.Subject.String(),
		Issuer:             c.Issuer.String(),
		PublicKey:          publicKeyName(c.PublicKey),
		SignatureAlgorithm: c.SignatureAlgorithm.String(),
		KeyUsage:           keyUsageNames(c.KeyUsage),
		ExtKeyUsage:        extKeyUsageNames(c),
		DNSNames:           c.DNSNames,
		NameConstraints:    constraintLines(c),
		SubjectKeyID:       hex.EncodeToString(c.SubjectKeyId),
		AuthorityKeyID:     hex.EncodeToString(c.AuthorityKeyId),
		state:              "valid",
		commonName:         c.Subject.CommonName,
	}
	sum := sha256.Sum256(c.Raw)
	v.SHA256 = hex.EncodeToString(sum[:])
	if c.IsCA && (c.MaxPathLen > 0 || c.MaxPathLenZero) {
		v.MaxPathLen = &c.MaxPathLen
	}
	for _, u := range c.URIs {
		v.URIs = append(v.URIs, u.String())
		if v.SPIFFEID == "" && u.Scheme == "spiffe" {
			v.SPIFFEID = u.String()
		}
	}
	for _, ip := range c.IPAddresses {
		v.IPAddresses = append(v.IPAddresses, ip.String())
	}
	switch {
	case now.After(c.NotAfter):
		v.state = "expired"
	case now.Before(c.NotBefore):
		v.state = "not yet valid"
	}
	return v
}

func lifeUsed(c *x509.Certificate, now time.Time) float64 {
	life := c.NotAfter.Sub(c.NotBefore)
	if life <= 0 {
		return 100
	}
	used := 100 * float64(now.Sub(c.NotBefore)) / float64(life)
	return float64(int64(10*max(0, used))) / 10
}

// nameOf returns the SPIFFE ID of a certificate, or else its subject, or its serial.
func nameOf(c *x509.Certificate) string { return visible(rawNameOf(c)) }

func rawNameOf(c *x509.Certificate) string {
	for _, u := range c.URIs {
		if u.Scheme == "spiffe" && (u.Path != "" || c.Subject.String() == "") {
			return u.String()
		}
	}
	if c.Subject.CommonName != "" {
		return c.Subject.CommonName
	}
	if s := c.Subject.String(); s != "" {
		return s
	}
	return fmt.Sprintf("serial %x", c.SerialNumber)
}

func publicKeyName(key any) string {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		return "ECDSA " + k.Curve.Params().Name
	case *rsa.PublicKey:
		return fmt.Sprintf("RSA %d", k.N.BitLen())
	case ed25519.PublicKey:
		return "Ed25519"
	default:
		return fmt.Sprintf("%T", key)
	}
}

func keyUsageNames(u x509.KeyUsage) []string {
	names := []string{"digitalSignature", "contentCommitment", "keyEncipherment", "dataEncipherment", "keyAgreement", "certSign", "crlSign", "encipherOnly", "decipherOnly"}
	var out []string
	for i, n := range names {
		if u&(1<<i) != 0 {
			out = append(out, n)
		}
	}
	return out
}

func extKeyUsageNames(c *x509.Certificate) []string {
	known := map[x509.ExtKeyUsage]string{
		x509.ExtKeyUsageAny: "any", x509.ExtKeyUsageServerAuth: "serverAuth", x509.ExtKeyUsageClientAuth: "clientAuth",
		x509.ExtKeyUsageCodeSigning: "codeSigning", x509.ExtKeyUsageEmailProtection: "emailProtection",
		x509.ExtKeyUsageTimeStamping: "timeStamping", x509.ExtKeyUsageOCSPSigning: "ocspSigning",
	}
	var out []string
	for _, u := range c.ExtKeyUsage {
		if n, ok := known[u]; ok {
			out = append(out, n)
		} else {
			out = append(out, fmt.Sprintf("ext-%d", u))
		}
	}
	for _, oid := range c.UnknownExtKeyUsage {
		out = append(out, oid.String())
	}
	return out
}

func constraintLines(c *x509.Certificate) []string {
	var out []string
	add := func(kind string, values []string) {
		if len(values) == 0 {
			return
		}
		shown := slices.Clone(values)
		for i, v := range shown {
			if v == "" { // every name ends in nothing (RFC 5280 section 4.2.1.10)
				shown[i] = "(any)"
			}
		}
		out = append(out, kind+" "+strings.Join(shown, ", "))
	}
	var permittedIP, excludedIP []string
	for _, n := range c.PermittedIPRanges {
		permittedIP = append(permittedIP, n.String())
	}
	for _, n := range c.ExcludedIPRanges {
		excludedIP = append(excludedIP, n.String())
	}
	add("permitted DNS", c.PermittedDNSDomains)
	add("excluded DNS", c.ExcludedDNSDomains)
	add("permitted IP", permittedIP)
	add("excluded IP", excludedIP)
	add("permitted URI", c.PermittedURIDomains)
	add("excluded URI", c.ExcludedURIDomains)
	return out
}

// printChain prints every certificate that signs none of the others, and under
// each the line of those that signed it.
func printChain(w io.Writer, views []certView, colored bool) error {
	parent := map[int]bool{}
	for _, v := range views {
		if v.issuerIndex >= 0 {
			parent[v.issuerIndex] = true
		}
	}
	var b strings.Builder
	for i := range views {
		if !parent[i] {
			printTree(&b, views, i, "", 0, colored)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func printTree(b *strings.Builder, views []certView, i int, indent string, depth int, colored bool) {
	v := views[i]
	if depth > 0 {
		fmt.Fprintf(b, "%s└─ signed by ", indent)
		indent += "   "
	}
	fmt.Fprintf(b, "%s\n", bold(visible(displayName(v)), colored))
	more := v.issuerIndex >= 0 && depth < len(views)
	bar := indent + "   "
	if more {
		bar = indent + "│  "
	}
	for _, line := range viewLines(v, colored) {
		fmt.Fprintf(b, "%s%-12s %s\n", bar, line[0], line[1])
	}
	if more {
		printTree(b, views, v.issuerIndex, indent, depth+1, colored)
	}
}

func displayName(v certView) string {
	switch {
	case v.IsCA && v.commonName != "":
		return v.commonName
	case v.SPIFFEID != "":
		return v.SPIFFEID
	case v.Subject != "":
		return v.Subject
	case len(v.DNSNames) > 0:
		return v.DNSNames[0]
	default:
		return "serial " + v.Serial
	}
}

func viewLines(v certView, colored bool) [][2]string {
	left := fmt.Sprintf("%s left, %.0f%% of life used", humanDuration(time.Duration(v.SecondsLeft)*time.Second), v.LifeUsedPercent)
	if v.state != "valid" {
		left = alarm(strings.ToUpper(v.state), colored)
	}
	lines := [][2]string{}
	add := func(name, value string) {
		if value != "" {
			if name != "valid" { // which holds colours of our own, and nobody else's text
				value = visible(value)
			}
			lines = append(lines, [2]string{name, value})
		}
	}
	if v.IsCA && v.SPIFFEID != "" {
		add("spiffe id", v.SPIFFEID)
	}
	if !v.IsCA {
		add("subject", v.Subject)
	}
	add("valid", fmt.Sprintf("%s to %s (%s)", v.NotBefore.Format(time.RFC3339), v.NotAfter.Format(time.RFC3339), left))
	add("key", v.PublicKey)
	add("usage", strings.Join(append(append([]string{}, v.KeyUsage...), v.ExtKeyUsage...), ", "))
	if v.IsCA {
		ca := "yes"
		if v.MaxPathLen != nil {
			ca = fmt.Sprintf("yes, path length %d", *v.MaxPathLen)
		}
		add("ca", ca)
	}
	if len(v.URIs) > 1 {
		add("uris", strings.Join(v.URIs, ", "))
	}
	add("dns", strings.Join(v.DNSNames, ", "))
	add("ip", strings.Join(v.IPAddresses, ", "))
	for _, c := range v.NameConstraints {
		add("constraint", c)
	}
	add("serial", v.Serial)
	add("key id", v.SubjectKeyID)
	switch {
	case v.SelfSigned:
		add("signed by", "itself")
	case v.issuerIndex < 0:
		add("signed by", strings.TrimSpace(v.Issuer+" (key id "+v.AuthorityKeyID+", not in this chain)"))
	}
	return lines
}

func humanDuration(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + humanDuration(-d)
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	default:
		return d.Truncate(time.Second).String()
	}
}

func bold(s string, colored bool) string {
	if colored {
		return "\x1b[1m" + s + "\x1b[0m"
	}
	return s
}

func alarm(s string, colored bool) string {
	if colored {
		return "\x1b[31m" + s + "\x1b[0m"
	}
	return s
}

func writePEM(w io.Writer, certs []*x509.Certificate) error {
	for _, c := range certs {
		if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return nil
}

func absolute(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("%q: %w", path, err)
	}
	return abs, nil
}
