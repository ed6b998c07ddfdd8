package webhook_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
	"castellan.dev/internal/workloads"
	"castellan.dev/webhook"
)

// TestTurnsOfAddresses: one address computes in half of the places at most, and
// however many of its reviews wait, who holds less comes first.
func TestTurnsOfAddresses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		take := webhook.Turns()
		ctx, cancel := context.WithCancel(t.Context())
		order := make(chan string, 64)
		leave := map[string]chan struct{}{}
		begin := func(ctx context.Context, source string) {
			if leave[source] == nil {
				leave[source] = make(chan struct{})
			}
			end := leave[source]
			go func() {
				release, err := take(ctx, source)
				if err != nil {
					return
				}
				order <- source
				<-end
				release()
			}()
			synctest.Wait()
		}
		taken := func() string {
			synctest.Wait()
			var all []string
			for len(order) > 0 {
				all = append(all, <-order)
			}
			return strings.Join(all, " ")
		}
		for range 10 {
			begin(ctx, "evil")
		}
		if got := taken(); got != "evil evil" {
			t.Errorf("one address holds %q", got)
		}
		for range 10 {
			begin(ctx, "evil2")
		}
		begin(t.Context(), "api")
		if got := taken(); got != "evil2 evil2" {
			t.Errorf("the other holds %q", got)
		}
		leave["evil"] <- struct{}{}
		if got := taken(); got != "api" {
			t.Errorf("next was %q, not who holds nothing", got)
		}
		cancel() // those who wait go, and leave no place taken
		synctest.Wait()
		leave["evil"] <- struct{}{}
		begin(t.Context(), "api")
		if got := taken(); got != "api" {
			t.Errorf("then %q", got)
		}
		close(leave["evil"])
		close(leave["evil2"])
		close(leave["api"])
	})
}

// TestManyWarnings: what there is to warn of is told apart without comparing each
// with all others.
func TestManyWarnings(t *testing.T) {
	var warnings []string
	findings := []authz.Finding{{Severity: authz.SeverityError, Field: "e", Reason: "last", More: 7}}
	for i := range 1_000_000 {
		warnings = append(warnings, fmt.Sprint("warning ", i/2))
		findings = append(findings, authz.Finding{Severity: authz.SeverityWarning, Field: "f", Reason: fmt.Sprint(i)})
	}
	got := webhook.Bounded(warnings)
	if len(got) != 11 || got[9] != "warning 9" || got[10] != "and 499990 more" {
		t.Errorf("%q", got)
	}
	findings = append(findings, authz.Finding{Severity: authz.SeverityWarning, Field: "document", Reason: "and 5 more warnings", More: 5},
		authz.Finding{Severity: authz.SeverityError, Field: "e", Reason: "one"})
	message, got := webhook.Split(findings)
	if message != "e: one; and 7 more" || len(got) != 11 || got[10] != "and 999995 more" {
		t.Errorf("%q %q", message, got)
	}
}

// TestReviewOfLargestPolicy: neither many values nor many declarations of ports
// make a review long.
func TestReviewOfLargestPolicy(t *testing.T) {
	file := &workloads.File{Resolved: true}
	for i := range 10_000 {
		var ports []workloads.Port
		for n := range 1000 {
			ports = append(ports, workloads.Port{Number: uint16(1 + i%1000 + n), Protocol: "tcp"})
		}
		if i > 200 {
			ports = file.Workloads[i%200].Ports
		}
		file.Workloads = append(file.Workloads, workloads.Workload{Namespace: "shop", ServiceAccount: "a", PodUID: fmt.Sprint(i), Ports: ports})
	}
	methods := make([]string, 9_000)
	for i := range methods {
		methods[i] = fmt.Sprint("a", i)
	}
	doc := policy.Document{Kind: policy.KindAuthorization, Metadata: policy.Metadata{Namespace: "shop", Name: "p"}, Authorization: &policy.AuthorizationPolicy{
		Action: policy.ActionDeny, Rules: []policy.Rule{{To: []policy.To{{Operation: &policy.Operation{Methods: methods}}}}}}}
	findings := webhook.Review(doc, policy.Mesh{}, file)
	if len(findings) != 101 || findings[100].More != 8901 {
		t.Errorf("%d findings, the last %v", len(findings), findings[len(findings)-1])
	}
}
