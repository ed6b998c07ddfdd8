package caclient_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
)

func TestMintJWT(t *testing.T) {
	s := agenttest.New(t)
	r := request(t)
	got, err := client(t, s, nil).MintJWT(timeout(t), r.Workload, r.Token, []string{"b", "a"})
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != r.Workload.ID() || got.Marshal() == "" || time.Until(got.Expires) < time.Minute {
		t.Errorf("got %v until %v", got.ID, got.Expires)
	}
	if text := fmt.Sprintf("%v %+v %#v %s", got, got, got, got); strings.Contains(text, got.Marshal()[:20]) {
		t.Errorf("shown: %s", text)
	}
}

func TestMintedTokensRefused(t *testing.T) {
	s := agenttest.New(t)
	id, later := agenttest.ID(account), time.Now().Add(time.Hour).Unix()
	claims := func(sub string, aud, exp any) string {
		return s.Mint(map[string]any{"sub": sub, "aud": aud, "exp": exp}, nil)
	}
	for _, test := range []struct{ name, token, id, want string }{
		{"nothing", "", id, "answer refused: JWT-SVID of 0 bytes"},
		{"too long", strings.Repeat("x", 9000), id, "answer refused: JWT-SVID of 9000 bytes"},
		{"garbage", "a.b.c", id, "answer refused: JWT-SVID is not a signed token of an algorithm that is allowed"},
		{"unsigned", "eyJhbGciOiJub25lIn0.e30.", id, "answer refused: JWT-SVID is not a signed token of an algorithm that is allowed"},
		{"said to be another's", claims(id, "a", later), agenttest.ID("shop/x"), `answer refused: JWT-SVID is said to name`},
		{"another's", claims(agenttest.ID("shop/x"), "a", later), id, `answer refused: JWT-SVID names "spiffe://cluster.local/ns/shop/sa/x"`},
		{"another audience", claims(id, "b", later), id, `answer refused: JWT-SVID is for audience ["b"], asked was ["a"]`},
		{"more audiences", claims(id, []string{"a", "b"}, later), id, `answer refused: JWT-SVID is for audience ["a" "b"], asked was ["a"]`},
		{"no audience", claims(id, nil, later), id, `answer refused: JWT-SVID is for audience`},
		{"expired", claims(id, "a", time.Now().Add(-time.Second).Unix()), id, "answer refused: JWT-SVID is expired or has no expiry; are the clocks right?"},
		{"no end", claims(id, "a", nil), id, "answer refused: JWT-SVID is expired or has no expiry; are the clocks right?"},
		{"an end past counting", claims(id, "a", 1e300), id, "answer refused: JWT-SVID is expired or has no expiry; are the clocks right?"},
	} {
		t.Run(test.name, func(t *testing.T) {
			resp := &castellanv1.MintJWTResponse{Token: test.token, SpiffeId: test.id}
			_, err := caclient.CheckJWT(resp, workload(t, account), []string{"a"}, time.Now())
			if err == nil || !strings.HasPrefix(err.Error(), test.want) {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}
