package jws_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"castellan.dev/internal/jws"
	"castellan.dev/internal/jws/jwstest"
)

const issuerName = "https://issuer.test"

func now() time.Time { return time.Unix(1_800_000_000, 0) }

func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func keySet(t testing.TB, issuers ...*jwstest.Issuer) *jws.KeySet {
	t.Helper()
	set, err := jws.ParseJWKS(jwstest.JWKS(t, issuers...))
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func want(aud ...string) jws.Expect { return jws.Expect{Issuer: issuerName, Audiences: aud} }

// forge signs any header over any payload with an RSA key as RS256 would, so that
// only what is said differs.
func forge(t testing.TB, key *rsa.PrivateKey, header, payload string) string {
	t.Helper()
	signed := b64(header) + "." + b64(payload)
	digest := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// TestAttacks: the known attacks on JWTs are refused.
func TestAttacks(t *testing.T) {
	is := jwstest.RSA(t, issuerName, "k1")
	rsaKey := is.Key.(*rsa.PrivateKey)
	set := keySet(t, is)
	good := `{"iss":"https://issuer.test","sub":"alice","aud":"x","exp":1800000600,"nbf":1800000000}`
	head := func(more string) string { return `{"alg":"RS256","kid":"k1"` + more + `}` }
	hs := func(key []byte, alg string) string {
		signed := b64(`{"alg":"`+alg+`","kid":"k1"}`) + "." + b64(good)
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(signed))
		return signed + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
	}
	der, err := x509.MarshalPKIXPublicKey(rsaKey.Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	attacker := jwstest.RSA(t, issuerName, "evil")
	embedded, err := json.Marshal(attacker.JWK())
	if err != nil {
		t.Fatal(err)
	}
	evilKey := attacker.Key.(*rsa.PrivateKey)
	cut := func(token string) string { return token[:strings.LastIndex(token, ".")+1] }
	ok := forge(t, rsaKey, head(""), good)

	tests := map[string]struct {
		token string
		is    error
		text  string
	}{
		"none, no signature":        {b64(`{"alg":"none"}`) + "." + b64(good) + ".", jws.ErrAlgorithm, `token algorithm not allowed: "none"`},
		"None":                      {b64(`{"alg":"None"}`) + "." + b64(good) + ".", jws.ErrAlgorithm, `"None"`},
		"nOnE with a signature":     {b64(`{"alg":"nOnE","kid":"k1"}`) + "." + b64(good) + ".AAAA", jws.ErrAlgorithm, `"nOnE"`},
		"empty algorithm":           {b64(`{"alg":"","kid":"k1"}`) + "." + b64(good) + ".AAAA", jws.ErrAlgorithm, `not allowed: ""`},
		"no algorithm":              {b64(`{"kid":"k1"}`) + "." + b64(good) + ".AAAA", jws.ErrAlgorithm, `not allowed: ""`},
		"algorithm is a list":       {b64(`{"alg":["RS256"],"kid":"k1"}`) + "." + b64(good) + ".AAAA", jws.ErrAlgorithm, `not allowed: ""`},
		"lower-case algorithm":      {forge(t, rsaKey, `{"alg":"rs256","kid":"k1"}`, good), jws.ErrAlgorithm, `"rs256"`},
		"HS256 with the PEM":        {hs(publicPEM, "HS256"), jws.ErrAlgorithm, `"HS256"`},
		"HS256 with the DER":        {hs(der, "HS256"), jws.ErrAlgorithm, `"HS256"`},
		"EdDSA":                     {forge(t, rsaKey, `{"alg":"EdDSA","kid":"k1"}`, good), jws.ErrAlgorithm, `"EdDSA"`},
		"RS1":                       {forge(t, rsaKey, `{"alg":"RS1","kid":"k1"}`, good), jws.ErrAlgorithm, `"RS1"`},
		"ES256 on an RSA key":       {forge(t, rsaKey, `{"alg":"ES256","kid":"k1"}`, good), jws.ErrAlgorithm, `ES256 is not what the key "k1" is for`},
		"PS256 on an RS256 key":     {forge(t, rsaKey, `{"alg":"PS256","kid":"k1"}`, good), jws.ErrAlgorithm, `PS256 is not what the key "k1" is for`},
		"no signature":              {cut(ok), jws.ErrMalformed, "no signature"},
		"kid of a path":             {forge(t, rsaKey, `{"alg":"RS256","kid":"../../dev/null"}`, good), jws.ErrUnknownKey, `kid "../../dev/null"`},
		"kid of SQL":                {forge(t, rsaKey, `{"alg":"RS256","kid":"k1' OR '1'='1"}`, good), jws.ErrUnknownKey, "unknown key"},
		"kid of a command":          {forge(t, rsaKey, `{"alg":"RS256","kid":"|/bin/true"}`, good), jws.ErrUnknownKey, "unknown key"},
		"kid a number":              {forge(t, rsaKey, `{"alg":"RS256","kid":1}`, good), jws.ErrMalformed, "kid is not a string"},
		"jwk ignored":               {forge(t, evilKey, head(`,"jwk":`+string(embedded)), good), jws.ErrSignature, "token signature wrong"},
		"jku ignored":               {forge(t, evilKey, head(`,"jku":"https://evil.test/keys"`), good), jws.ErrSignature, "token signature wrong"},
		"x5u ignored":               {forge(t, evilKey, head(`,"x5u":"https://evil.test/c"`), good), jws.ErrSignature, "token signature wrong"},
		"x5c ignored":               {forge(t, evilKey, head(`,"x5c":["AAAA"]`), good), jws.ErrSignature, "token signature wrong"},
		"attacker's jwk and kid":    {forge(t, evilKey, `{"alg":"RS256","kid":"evil","jwk":`+string(embedded)+`}`, good), jws.ErrUnknownKey, `kid "evil"`},
		"crit unknown":              {forge(t, rsaKey, head(`,"crit":["exp"]`), good), jws.ErrMalformed, "header has crit"},
		"crit b64":                  {forge(t, rsaKey, head(`,"crit":["b64"],"b64":false`), good), jws.ErrMalformed, "header has crit"},
		"crit empty":                {forge(t, rsaKey, head(`,"crit":[]`), good), jws.ErrMalformed, "header has crit"},
		"typ of another purpose":    {forge(t, rsaKey, head(`,"typ":"logout+jwt"`), good), jws.ErrMalformed, `typ "logout+jwt"`},
		"typ a number":              {forge(t, rsaKey, head(`,"typ":3`), good), jws.ErrMalformed, "typ"},
		"exp missing":               {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","aud":"x"}`), jws.ErrMalformed, "no exp"},
		"exp null":                  {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":null}`), jws.ErrMalformed, "exp is not a time in whole seconds"},
		"exp a string":              {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":"1800000600"}`), jws.ErrMalformed, "exp is not a time"},
		"exp a float":               {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1800000600.5}`), jws.ErrMalformed, "exp is not a time"},
		"exp 1e10":                  {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1e10}`), jws.ErrMalformed, "exp is not a time"},
		"exp overflows int64":       {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":9223372036854775808}`), jws.ErrMalformed, "exp is not a time"},
		"exp overflows time":        {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":9223372036854775807}`), jws.ErrMalformed, "exp is not a time"},
		"exp after year 9999":       {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":253402300800}`), jws.ErrMalformed, "exp is not a time"},
		"exp negative":              {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":-1}`), jws.ErrMalformed, "exp is not a time"},
		"exp is now":                {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1800000000}`), jws.ErrExpired, "token expired: at 2027-01-15T08:00:00Z"},
		"exp a second ago":          {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1799999999}`), jws.ErrExpired, "token expired"},
		"nbf a float":               {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1800000600,"nbf":1.5}`), jws.ErrMalformed, "nbf is not a time"},
		"nbf overflows":             {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1800000600,"nbf":1e30}`), jws.ErrMalformed, "nbf is not a time"},
		"nbf past the leeway":       {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1800000600,"nbf":1800000006}`), jws.ErrNotYetValid, "token not yet valid: before 2027-01-15T08:00:06Z"},
		"iat past the leeway":       {forge(t, rsaKey, head(""), `{"iss":"https://issuer.test","exp":1800000600,"iat":1800000006}`), jws.ErrNotYetValid, "token not yet valid"},
		"aud of another":            {forge(t, rsaKey, head(""), strings.Replace(good, `"x"`, `"y"`, 1)), jws.ErrAudience, `token audience not accepted: token is for ["y"]`},
		"aud list of others":        {forge(t, rsaKey, head(""), strings.Replace(good, `"x"`, `["y","z"]`, 1)), jws.ErrAudience, `["y" "z"]`},
		"aud list in a string":      {forge(t, rsaKey, head(""), strings.Replace(good, `"x"`, `"[\"x\"]"`, 1)), jws.ErrAudience, "token audience"},
		"aud with a number":         {forge(t, rsaKey, head(""), strings.Replace(good, `"x"`, `["x",1]`, 1)), jws.ErrMalformed, "aud holds something else than strings"},
		"aud an object":             {forge(t, rsaKey, head(""), strings.Replace(good, `"x"`, `{"x":1}`, 1)), jws.ErrMalformed, "aud is neither a string nor a list"},
		"aud missing":               {forge(t, rsaKey, head(""), strings.Replace(good, `"aud":"x",`, ``, 1)), jws.ErrAudience, "token is for []"},
		"aud empty list":            {forge(t, rsaKey, head(""), strings.Replace(good, `"x"`, `[]`, 1)), jws.ErrAudience, "token is for []"},
		"iss of another":            {forge(t, rsaKey, head(""), strings.Replace(good, "issuer.test", "evil.test", 1)), jws.ErrIssuer, `token issuer not accepted: "https://evil.test"`},
		"iss with a slash more":     {forge(t, rsaKey, head(""), strings.Replace(good, "issuer.test", "issuer.test/", 1)), jws.ErrIssuer, "issuer.test/"},
		"iss a list":                {forge(t, rsaKey, head(""), strings.Replace(good, `"https://issuer.test"`, `["https://issuer.test"]`, 1)), jws.ErrMalformed, "iss is not a string"},
		"iss missing":               {forge(t, rsaKey, head(""), `{"exp":1800000600,"aud":"x"}`), jws.ErrIssuer, "token issuer not accepted"},
		"sub a number":              {forge(t, rsaKey, head(""), strings.Replace(good, `"alice"`, `7`, 1)), jws.ErrMalformed, "sub is not a string"},
		"duplicate claim":           {forge(t, rsaKey, head(""), strings.Replace(good, `"sub":"alice"`, `"sub":"bob","sub":"alice"`, 1)), jws.ErrMalformed, `member "sub" stands twice`},
		"duplicate by escape":       {forge(t, rsaKey, head(""), strings.Replace(good, `"sub":"alice"`, `"sub":"bob","su\u0062":"alice"`, 1)), jws.ErrMalformed, `member "sub" stands twice`},
		"duplicate nested claim":    {forge(t, rsaKey, head(""), strings.Replace(good, `"sub":"alice"`, `"a":{"b":1,"b":2}`, 1)), jws.ErrMalformed, `member "b" stands twice`},
		"duplicate header":          {forge(t, rsaKey, `{"alg":"none","alg":"RS256","kid":"k1"}`, good), jws.ErrMalformed, `member "alg" stands twice`},
		"payload a list":            {forge(t, rsaKey, head(""), `[]`), jws.ErrMalformed, "an object is wanted"},
		"payload and more":          {forge(t, rsaKey, head(""), good+`{}`), jws.ErrMalformed, "data after the object"},
		"payload with invalid text": {forge(t, rsaKey, head(""), "{\"iss\":\"\xff\"}"), jws.ErrMalformed, "invalid UTF-8"},
		"deep payload":              {forge(t, rsaKey, head(""), `{"a":`+strings.Repeat("[", 100)+strings.Repeat("]", 100)+`}`), jws.ErrMalformed, "nested too deep"},
		"five parts (JWE)":          {ok + ".AAAA.AAAA", jws.ErrMalformed, "5 parts, 3 are wanted"},
		"four parts":                {ok + ".AAAA", jws.ErrMalformed, "4 parts"},
		"two parts":                 {b64(head("")) + "." + b64(good), jws.ErrMalformed, "2 parts"},
		"empty":                     {"", jws.ErrMalformed, "1 parts"},
		"padded":                    {strings.Replace(ok, ".", "=.", 1), jws.ErrMalformed, "header"},
		"line break":                {strings.Replace(ok, ".", "\n.", 1), jws.ErrMalformed, "illegal base64"},
		"standard base64":           {strings.Replace(ok, ".", "+/.", 1), jws.ErrMalformed, "header"},
		"space around":              {" " + ok, jws.ErrMalformed, "header"},
		"over 8 KiB":                {ok + strings.Repeat("A", jws.MaxSize), jws.ErrTooLarge, "8192 are allowed"},
		"over 8 KiB, unreadable":    {strings.Repeat("é", jws.MaxSize), jws.ErrTooLarge, "token too large"},
		"signature of another key":  {forge(t, evilKey, head(""), good), jws.ErrSignature, "token signature wrong"},
		"payload exchanged":         {strings.Replace(ok, b64(good), b64(strings.Replace(good, "alice", "admin", 1)), 1), jws.ErrSignature, "token signature wrong"},
	}
	if _, err := jws.Verify(ok, set, want("x"), now()); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := jws.Verify(tt.token, set, want("x"), now())
			if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("error %v, want %q (%v)", err, tt.text, tt.is)
			}
			if got != nil {
				t.Fatal("a token came back with the error")
			}
		})
	}
}

func TestAccepted(t *testing.T) {
	is := jwstest.RSA(t, issuerName, "k1")
	set := keySet(t, is)
	base := is.Base(now(), "x")
	tests := map[string]jwstest.Claims{
		"aud a string":            base.With(jwstest.Claims{"aud": "x"}),
		"aud one of a list":       base.With(jwstest.Claims{"aud": []string{"a", "x"}}),
		"nbf within the leeway":   base.With(jwstest.Claims{"nbf": now().Unix() + 5}),
		"no nbf and iat":          base.With(jwstest.Claims{"nbf": nil, "iat": nil}),
		"one second to live":      base.With(jwstest.Claims{"exp": now().Unix() + 1}),
		"no sub":                  base.With(jwstest.Claims{"sub": nil}),
		"floats elsewhere":        base.With(jwstest.Claims{"score": 1.5}),
		"claims named as headers": base.With(jwstest.Claims{"crit": []string{"x"}, "alg": "none"}),
	}
	for name, claims := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := jws.Verify(is.Sign(t, claims), set, want("x"), now())
			if err != nil || got.Issuer != issuerName {
				t.Fatalf("%+v, %v", got, err)
			}
		})
	}
	for _, typ := range []string{"JWT", "jwt", "JOSE", "at+jwt", "application/at+jwt"} {
		payload, _ := json.Marshal(base)
		if _, err := jws.Verify(is.SignRaw(t, payload, map[jose.HeaderKey]any{"typ": typ}), set, want("x"), now()); err != nil {
			t.Errorf("typ %q: %v", typ, err)
		}
	}
}

// TestAlgorithms verifies what go-jose signed, by every algorithm of the list.
func TestAlgorithms(t *testing.T) {
	rsaKey := jwstest.RSA(t, issuerName, "rsa").Key
	for alg, curve := range map[jose.SignatureAlgorithm]elliptic.Curve{
		jose.RS256: nil, jose.RS384: nil, jose.RS512: nil, jose.PS256: nil, jose.PS384: nil, jose.PS512: nil,
		jose.ES256: elliptic.P256(), jose.ES384: elliptic.P384(), jose.ES512: elliptic.P521(),
	} {
		t.Run(string(alg), func(t *testing.T) {
			is := &jwstest.Issuer{Name: issuerName, KeyID: "k", Alg: alg, Key: rsaKey}
			if curve != nil {
				key, err := ecdsa.GenerateKey(curve, rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				is.Key = key
			}
			token := is.Sign(t, is.Base(now(), "x"))
			if _, err := jws.Verify(token, keySet(t, is), want("x"), now()); err != nil {
				t.Fatal(err)
			}
			// Every bit of the last signature byte but the unused ones counts.
			broken := []byte(token)
			i := len(broken) - 5
			if broken[i] == 'A' {
				broken[i] = 'B'
			} else {
				broken[i] = 'A'
			}
			if _, err := jws.Verify(string(broken), keySet(t, is), want("x"), now()); !errors.Is(err, jws.ErrSignature) {
				t.Fatalf("changed signature: %v", err)
			}
		})
	}
}

func TestKeyChoice(t *testing.T) {
	a, b := jwstest.RSA(t, issuerName, "a"), jwstest.EC(t, issuerName, "b")
	anonymous := &jwstest.Issuer{Name: issuerName, Alg: a.Alg, Key: a.Key}
	second := jwstest.EC(t, issuerName, "a") // same kid, other type: RFC 7517 4.5 allows it
	tests := map[string]struct {
		token string
		set   *jws.KeySet
		is    error
	}{
		"kid among two":            {b.Sign(t, b.Base(now(), "x")), keySet(t, a, b), nil},
		"no kid, one key":          {anonymous.Sign(t, a.Base(now(), "x")), keySet(t, a), nil},
		"no kid, two keys":         {anonymous.Sign(t, a.Base(now(), "x")), keySet(t, a, b), jws.ErrUnknownKey},
		"kid, key without one":     {a.Sign(t, a.Base(now(), "x")), keySet(t, anonymous), jws.ErrUnknownKey},
		"two keys of one kid":      {second.Sign(t, second.Base(now(), "x")), keySet(t, a, second), nil},
		"no set":                   {a.Sign(t, a.Base(now(), "x")), nil, jws.ErrUnavailable},
		"a set that was withdrawn": {a.Sign(t, a.Base(now(), "x")), keySet(t), jws.ErrUnknownKey},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := jws.Verify(tt.token, tt.set, want("x"), now()); !errors.Is(err, tt.is) {
				t.Fatalf("error %v, want %v", err, tt.is)
			}
		})
	}
}

func TestParseJWKS(t *testing.T) {
	good := string(jwstest.JWKS(t, jwstest.EC(t, issuerName, "a")))
	key := strings.TrimSuffix(strings.TrimPrefix(good, `{"keys":[`), `]}`)
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Skip("this build makes no weak keys: ", err)
	}
	weakJWK, err := json.Marshal(jose.JSONWebKey{Key: weak.Public(), KeyID: "w", Use: "sig"})
	if err != nil {
		t.Fatal(err)
	}
	private, err := json.Marshal(jose.JSONWebKey{Key: jwstest.EC(t, "", "").Key, KeyID: "p", Use: "sig"})
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		data string
		keys int
		err  string
	}{
		"good":                 {good, 1, ""},
		"with unknown members": {strings.Replace(good, "{", `{"x":1,`, 1), 1, ""},
		"empty list":           {`{"keys":[]}`, 0, ""},
		"use enc":              {strings.Replace(good, `"use":"sig"`, `"use":"enc"`, 1), 0, ""},
		"use jwt-svid":         {strings.Replace(good, `"use":"sig"`, `"use":"jwt-svid"`, 1), 1, ""},
		"use x509-svid":        {strings.Replace(good, `"use":"sig"`, `"use":"x509-svid"`, 1), 0, ""},
		"key_ops sign":         {strings.Replace(good, `"use":"sig"`, `"key_ops":["sign"]`, 1), 0, ""},
		"key_ops verify":       {strings.Replace(good, `"use":"sig"`, `"key_ops":["verify"]`, 1), 1, ""},
		"symmetric":            {`{"keys":[{"kty":"oct","k":"c2VjcmV0","kid":"s"},` + key + `]}`, 1, ""},
		"unknown type":         {`{"keys":[{"kty":"QQ","kid":"s"},` + key + `]}`, 1, ""},
		"junk among keys":      {`{"keys":[7,` + key + `]}`, 1, ""},
		"weak RSA":             {`{"keys":[` + string(weakJWK) + `,` + key + `]}`, 1, ""},
		"private key":          {`{"keys":[` + string(private) + `,` + key + `]}`, 1, ""},
		"no keys member":       {`{}`, 0, `the member "keys" is missing`},
		"null keys":            {`{"keys":null}`, 0, `the member "keys" is missing`},
		"keys an object":       {`{"keys":{}}`, 0, "not a JSON key set"},
		"HTML":                 {`<html>`, 0, "not a JSON key set"},
		"empty":                {``, 0, "not a JSON key set"},
		"too large":            {`{"keys":[]}` + strings.Repeat(" ", 64<<10), 0, "65536 are allowed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			set, err := jws.ParseJWKS([]byte(tt.data))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil || set.Len() != tt.keys {
				t.Fatalf("%d keys, %v; want %d", set.Len(), err, tt.keys)
			}
		})
	}
}

// FuzzAgainstJOSE holds that whatever is accepted here, go-jose accepts too, and
// reads the same from it.
func FuzzAgainstJOSE(f *testing.F) {
	is := jwstest.EC(f, issuerName, "k1")
	set := keySet(f, is)
	f.Add([]byte(`{"iss":"https://issuer.test","exp":1800000600,"aud":["x","y"],"a":{"b":[1,-2.5e3,true,null,"\u00e9\ud83d\ude00"]}}`), "")
	f.Add([]byte(`{"iss":"https://issuer.test","exp":1800000600,"exp":1}`), `,"typ":"JWT"`)
	f.Add([]byte(`{"exp":01}`), `,"crit":["x"]`)
	f.Fuzz(func(t *testing.T, payload []byte, header string) {
		signed := b64(`{"alg":"ES256","kid":"k1"`+header+`}`) + "." + base64.RawURLEncoding.EncodeToString(payload)
		digest := sha256.Sum256([]byte(signed))
		r, s, err := ecdsa.Sign(rand.Reader, is.Key.(*ecdsa.PrivateKey), digest[:])
		if err != nil {
			t.Fatal(err)
		}
		sig := append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)
		token := signed + "." + base64.RawURLEncoding.EncodeToString(sig)
		got, err := jws.Verify(token, set, jws.Expect{}, now())
		if err != nil {
			return
		}
		object, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			// go-jose reads header members that are ignored here (jwk, x5c, nonce).
			if strings.Contains(header, "jwk") || strings.Contains(header, "x5c") || strings.Contains(header, "nonce") {
				return
			}
			t.Fatalf("accepted %q, go-jose does not: %v", token, err)
		}
		if _, err := object.Verify(is.JWK()); err != nil {
			t.Fatalf("accepted %q, go-jose does not: %v", token, err)
		}
		var theirs map[string]any
		dec := json.NewDecoder(strings.NewReader(string(payload)))
		dec.UseNumber()
		if err := dec.Decode(&theirs); err != nil {
			t.Fatalf("accepted %q, encoding/json does not: %v", payload, err)
		}
		ours, _ := json.Marshal(got.Claims)
		other, _ := json.Marshal(theirs)
		if string(ours) != string(other) {
			t.Fatalf("read %s, encoding/json reads %s", ours, other)
		}
	})
}

// FuzzParse: whatever a peer writes, parsing ends with a token or an error that
// says which kind it is.
func FuzzParse(f *testing.F) {
	f.Add(b64(`{"alg":"RS256"}`) + "." + b64(`{"iss":"x"}`) + ".AAAA")
	f.Add("a.b.c")
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := jws.Parse(token); err != nil &&
			!errors.Is(err, jws.ErrMalformed) && !errors.Is(err, jws.ErrTooLarge) && !errors.Is(err, jws.ErrAlgorithm) {
			t.Fatalf("an error of no kind: %v", err)
		}
	})
}

func BenchmarkVerifyRS256(b *testing.B) {
	is := jwstest.RSA(b, issuerName, "k1")
	set := keySet(b, is)
	token := is.PodToken(b, now(), jwstest.Pod{Namespace: "shop", Account: "orders", AccountUID: "a", Name: "orders-1", UID: "u", Node: "n", NodeUID: "m"}, "x")
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := jws.Verify(token, set, want("x"), now()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("go-jose", func(b *testing.B) {
		b.ReportAllocs()
		jwk := is.JWK()
		for b.Loop() {
			object, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.RS256})
			if err != nil {
				b.Fatal(err)
			}
			payload, err := object.Verify(jwk)
			if err != nil {
				b.Fatal(err)
			}
			var claims map[string]any
			if err := json.Unmarshal(payload, &claims); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("bare", func(b *testing.B) {
		signed := token[:strings.LastIndex(token, ".")]
		sig, _ := base64.RawURLEncoding.DecodeString(token[len(signed)+1:])
		digest := sha256.Sum256([]byte(signed))
		for b.Loop() {
			if err := rsa.VerifyPKCS1v15(is.Key.Public().(*rsa.PublicKey), crypto.SHA256, digest[:], sig); err != nil {
				b.Fatal(err)
			}
		}
	})
}
