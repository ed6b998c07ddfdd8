package caclient_test

import (
	"strings"
	"testing"

	"castellan.dev/agent/agenttest"
	"castellan.dev/agent/caclient"
)

func TestHeld(t *testing.T) {
	credential := func(uid string) caclient.Credential {
		c, err := caclient.NewCredential(agenttest.Token("shop/orders", uid))
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first, second := credential("uid-1"), credential("uid-2")
	h := caclient.Hold("token of pod uid-1", first)
	if got, err := h.Read(); err != nil || got != first || h.Where() != "token of pod uid-1" {
		t.Errorf("%v %v %q", got, err, h.Where())
	}
	stamp := h.Stamp()
	if h.Set(first) || !h.Stamp().Same(stamp) {
		t.Error("the same token counts as another")
	}
	if !h.Set(second) || h.Stamp().Same(stamp) {
		t.Error("another token counts as the same")
	}
	if got, err := h.Read(); err != nil || got != second {
		t.Errorf("%v %v", got, err)
	}
	h.Drop()
	if _, err := h.Read(); err == nil || !strings.Contains(err.Error(), "there is none any more") {
		t.Errorf("after it was dropped: %v", err)
	}
}
