package workloadapi_test

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	gospiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"castellan.dev/agent/agenttest"
)

// b64 encodes one part of a token.
func b64(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

func TestValidateJWTSVID(t *testing.T) {
	a := ready(t)
	id, later := agenttest.ID(account), time.Now().Add(time.Hour).Unix()
	claims := func(change map[string]any) map[string]any {
		c := map[string]any{"sub": id, "aud": []string{"x", "payments"}, "exp": later, "iat": time.Now().Unix()}
		for k, v := range change {
			if v == nil {
				delete(c, k)
			} else {
				c[k] = v
			}
		}
		return c
	}
	mint := func(change map[string]any) string { return a.fake.Mint(claims(change), nil) }
	good := mint(nil)
	header, rest, _ := strings.Cut(good, ".")
	payload, signature, _ := strings.Cut(rest, ".")
	other := agenttest.New(t) // another key under the same kid
	hmacSigner, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.HS256, Key: []byte(strings.Repeat("k", 32))}, (&jose.SignerOptions{}).WithHeader("kid", "jwt-1"))
	if err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(claims(nil))
	if err != nil {
		t.Fatal(err)
	}
	hmacJWS, err := hmacSigner.Sign(body)
	if err != nil {
		t.Fatal(err)
	}
	hmac, err := hmacJWS.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	with := func(name jose.HeaderKey, value any) string {
		return a.fake.Mint(claims(nil), map[jose.HeaderKey]any{name: value})
	}
	const (
		malformed = "token is malformed or of an algorithm that is not allowed"
		headers   = "header has parameters that are not allowed"
	)
	for _, test := range []struct{ name, token, want string }{
		{"spiffe-52 good", good, ""},
		{"spiffe-17 typ JOSE", with("typ", "JOSE"), ""},
		{"spiffe-19 audience as a string", mint(map[string]any{"aud": "payments"}), ""},
		{"spiffe-16 not compact: JSON", `{"payload":"` + payload + `","protected":"` + header + `","signature":"` + signature + `"}`, malformed},
		{"spiffe-16 five parts (JWE)", good + ".a.b", malformed},
		{"spiffe-16 two parts", header + "." + payload, malformed},
		{"spiffe-16 jku", with("jku", "https://evil.example/keys"), headers},
		{"spiffe-16 x5u", with("x5u", "https://evil.example/x"), headers},
		{"spiffe-16 x5c", with("x5c", []string{base64.StdEncoding.EncodeToString(a.fake.Authority().Root.Raw)}), headers},
		{"spiffe-16 cty", with("cty", "JWT"), headers},
		{"spiffe-16 an unknown critical header", with("crit", []string{"x"}), headers},
		{"spiffe-17 typ of something else", with("typ", "at+jwt"), "header typ is not allowed"},
		{"spiffe-17 alg none", b64(`{"alg":"none","kid":"jwt-1"}`) + "." + payload + ".", malformed},
		{"spiffe-17 alg None", b64(`{"alg":"None","kid":"jwt-1"}`) + "." + payload + ".", malformed},
		{"spiffe-17 HMAC with a public key's name", hmac, malformed},
		{"spiffe-17 alg swapped for RS256", b64(`{"alg":"RS256","kid":"jwt-1"}`) + "." + payload + "." + signature, "signature does not verify"},
		{"spiffe-18 no subject", mint(map[string]any{"sub": nil}), "subject is not a SPIFFE ID"},
		{"spiffe-18 subject of another kind", mint(map[string]any{"sub": "orders@shop"}), "subject is not a SPIFFE ID"},
		{"spiffe-18 subject that is no string", mint(map[string]any{"sub": 7}), "token is malformed"},
		{"spiffe-19 no audience", mint(map[string]any{"aud": nil}), "audience is another"},
		{"spiffe-19 another audience", mint(map[string]any{"aud": "paymentsx"}), "audience is another"},
		{"spiffe-19 audience of numbers", mint(map[string]any{"aud": []any{"payments", 7}}), "audience is another"},
		{"spiffe-19 no expiry", mint(map[string]any{"exp": nil}), "token has no expiry"},
		{"spiffe-19 expired by a second", mint(map[string]any{"exp": time.Now().Add(-time.Second).Unix()}), "token is expired"},
		{"spiffe-19 expiry past counting", mint(map[string]any{"exp": 1e300}), "token is malformed"},
		{"spiffe-19 expiry as text", mint(map[string]any{"exp": "tomorrow"}), "token is malformed"},
		{"spiffe-19 negative expiry", mint(map[string]any{"exp": -1}), "token is malformed"},
		{"not valid yet", mint(map[string]any{"nbf": later}), "token is not valid yet"},
		{"spiffe-21 unknown key", with("kid", "jwt-2"), "no key of the trust domain has signed it"},
		{"spiffe-21 a key for another use", with("kid", "x509-1"), "no key of the trust domain has signed it"},
		{"spiffe-21 no kid", with("kid", ""), "header has no key id"},
		{"a kid that climbs", with("kid", "../../jwt-1"), "no key of the trust domain has signed it"},
		{"spiffe-52 a trust domain without JWT keys", mint(map[string]any{"sub": "spiffe://other.example/x"}), "no key of the trust domain has signed it"},
		{"spiffe-52 an unknown trust domain", mint(map[string]any{"sub": "spiffe://evil.example/x"}), "no key of the trust domain has signed it"},
		{"spiffe-52 another's signature", other.Mint(claims(nil), nil), "signature does not verify"},
		{"spiffe-52 claims changed after signing", header + "." + b64(strings.Replace(string(body), "payments", "paymentz", 1)) + "." + signature, "signature does not verify"},
		{"claims twice", a.fake.SignPayload(`{"sub":"` + id + `","sub":"` + id + `","aud":"payments","exp":9999999999}`), "token is malformed"},
		{"too long", good + strings.Repeat("x", 9000), "token is too long"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m, err := a.client.ValidateJWTSVID(authorized(t), &workload.ValidateJWTSVIDRequest{Audience: "payments", Svid: test.token})
			if test.want == "" {
				if err != nil || m.GetSpiffeId() != id || m.GetClaims().GetFields()["sub"].GetStringValue() != id {
					t.Errorf("got %v %v", m, err)
				}
				return
			}
			if status.Code(err) != codes.InvalidArgument || status.Convert(err).Message() != "JWT-SVID refused: "+test.want {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	t.Run("spiffe-47 empty fields", func(t *testing.T) {
		for want, r := range map[string]*workload.ValidateJWTSVIDRequest{
			"audience must be given": {Svid: good}, "svid must be given": {Audience: "payments"},
		} {
			_, err := a.client.ValidateJWTSVID(authorized(t), r)
			if status.Code(err) != codes.InvalidArgument || status.Convert(err).Message() != want {
				t.Errorf("got %v, want %q", err, want)
			}
		}
	})
	t.Run("spiffe-52 with go-spiffe", func(t *testing.T) {
		c, err := gospiffe.New(t.Context(), gospiffe.WithAddr("unix://"+a.socket))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		got, err := c.ValidateJWTSVID(t.Context(), good, "payments")
		if err != nil || got.ID.String() != id {
			t.Errorf("got %v %v", got, err)
		}
	})
	t.Run("no token reaches the log", func(t *testing.T) {
		for _, part := range []string{signature, payload} {
			if strings.Contains(a.log.String(), part) {
				t.Error("it does")
			}
		}
	})
}
