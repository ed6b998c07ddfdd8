package caclient_test

import (
	"bytes"
	"encoding/pem"
	"slices"
	"testing"
	"time"

	castellanv1 "castellan.dev/api/castellan/v1"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
)

// FuzzAnswer: no answer makes the check panic, and none but the good one passes.
//
// The input says what to change of the good answer instead of being one: the
// keys are other ones in every process that fuzzes, so that an answer kept from
// one would be noise in the next, and shortening it would take all of the time.
func FuzzAnswer(f *testing.F) {
	a, k := agenttest.NewAuthority(f, "fuzz"), key(f)
	w := workload(f, account)
	leaf := a.Leaf(f, agenttest.ID(account), k.Public(), time.Hour, nil)
	other := a.Leaf(f, agenttest.ID("shop/other"), k.Public(), time.Hour, nil)
	good := a.Elements(leaf)
	if _, err := caclient.CheckChain(good, w, k.Public(), time.Now()); err != nil {
		f.Fatal(err)
	}
	// Which element; whether its DER is changed or its PEM; at which byte, how many
	// go, and what comes.
	f.Add(uint8(0), false, uint16(0), uint16(0), []byte{})
	f.Add(uint8(0), false, uint16(100), uint16(0xffff), []byte{})
	f.Add(uint8(0), true, uint16(0), uint16(0xffff), other.Raw[:8])
	f.Add(uint8(1), true, uint16(200), uint16(1), []byte{0xff})
	f.Add(uint8(2), false, uint16(0), uint16(0), []byte("\n"))
	f.Add(uint8(3), true, uint16(0), uint16(0xffff), []byte{0x30, 0x80})
	f.Fuzz(func(t *testing.T, which uint8, der bool, at, gone uint16, comes []byte) {
		answer := append(slices.Clone(good), agenttest.PEM(other))
		if which%8 < 4 {
			answer = answer[:len(good)]
		}
		text := []byte(answer[int(which)%len(answer)])
		if der {
			block, _ := pem.Decode(text)
			block.Bytes = splice(block.Bytes, at, gone, comes)
			text = pem.EncodeToMemory(block)
		} else {
			text = splice(text, at, gone, comes)
		}
		answer[int(which)%len(answer)] = string(text)
		got, err := caclient.CheckChain(answer, w, k.Public(), time.Now())
		if (got == nil) == (err == nil) {
			t.Fatalf("got %v and %v", got, err)
		}
		if err == nil && (got.ID != w.ID() || !bytes.Equal(got.Leaf.Raw, leaf.Raw)) {
			t.Errorf("accepted %q", got.ID)
		}
	})
}

// splice replaces gone bytes at a place.
func splice(b []byte, at, gone uint16, comes []byte) []byte {
	from := int(at) % (len(b) + 1)
	to := min(from+int(gone), len(b))
	return slices.Concat(b[:from], comes, b[to:])
}

// FuzzCredential: what is read of a token never panics, and nothing unprintable passes.
func FuzzCredential(f *testing.F) {
	f.Add(agenttest.Token(account, "uid"))
	f.Add("a.e30.c")
	f.Add("a.b\r\nx: y")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := caclient.NewCredential(text)
		if err != nil {
			return
		}
		claims, err := c.Claims()
		if err == nil && claims.Account.IsZero() {
			t.Error("claims of nobody")
		}
	})
}

// FuzzMinted: no token makes the check panic, and none of another passes.
func FuzzMinted(f *testing.F) {
	w := workload(f, account)
	f.Add("eyJhbGciOiJFUzI1NiJ9.e30.AAAA")
	f.Add("")
	f.Fuzz(func(t *testing.T, token string) {
		resp := &castellanv1.MintJWTResponse{Token: token, SpiffeId: w.ID().String()}
		if got, err := caclient.CheckJWT(resp, w, []string{"a"}, time.Now()); err == nil && !got.Expires.After(time.Now()) {
			t.Error("accepted an expired one")
		}
	})
}
