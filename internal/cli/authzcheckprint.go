package cli

import (
	"cmp"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"castellan.dev/api/policy"
)

func now() time.Time { return time.Now() } //nolint:forbidigo // a command line reads the real clock

func (v *workloadPolicy) print(w io.Writer, s *scene) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "WORKLOAD\t%s\n", visible(v.Namespace+"/"+cmp.Or(v.Pod, v.ServiceAccount)))
	fmt.Fprintf(t, "IDENTITY\t%s\n", visible(v.SPIFFEID))
	fmt.Fprintf(t, "NODE\t%s\n", orDash(visible(v.Node)))
	fmt.Fprintf(t, "PROXY\t%s\n", visible(v.proxyLine()))
	fmt.Fprint(t, "\nPORT\tPROTOCOL\tMUTUAL TLS\tWHAT IS NOT HTTP\n")
	for _, p := range v.Ports {
		number, protocol, rest := fmt.Sprint(p.Number), cmp.Or(p.Protocol, "by first bytes"), "-"
		if p.Number == 0 {
			number = "others"
		}
		if p.HTTPOnly {
			rest = "refused, as rules are about HTTP"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", number, visible(protocol), p.MTLS, rest)
	}
	fmt.Fprintln(t)
	v.printPolicies(t, s)
	if len(v.Tokens) > 0 {
		fmt.Fprint(t, "\nISSUER OF TOKENS\tAUDIENCES\tKEYS\tFROM\n")
		for _, r := range v.Tokens {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", visible(r.Issuer), visible(cmp.Or(strings.Join(r.Audiences, ", "), "any")), visible(r.Keys), visible(strings.Join(r.From, "; ")))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(v.Warnings) == 0 {
		return nil
	}
	if _, err := fmt.Fprintln(w, "\nWARNINGS"); err != nil {
		return err
	}
	for _, text := range v.Warnings {
		if _, err := fmt.Fprintf(w, "  %s\n", visible(text)); err != nil {
			return err
		}
	}
	return nil
}

func (v *workloadPolicy) proxyLine() string {
	switch {
	case !v.InMesh:
		return "none: outside the mesh"
	case v.proxy == nil:
		return "unknown"
	case v.proxy.ok():
		return "policy version " + shortVersion(v.proxy.Offered) + " acknowledged"
	}
	return v.proxy.State + ": " + v.proxy.Reason
}

func (v *workloadPolicy) printPolicies(t io.Writer, s *scene) {
	if len(v.Policies) == 0 {
		fmt.Fprintf(t, "No policy selects it: no ALLOW policy means that everything is allowed.\n")
		return
	}
	allows := false
	fmt.Fprint(t, "POLICY\tACTION\tSELECTS\tRULES\tSTATE\n")
	for _, p := range v.Policies {
		action := cmp.Or(p.Action, "-")
		if p.DryRun {
			action += " (dry run)"
		}
		allows = allows || p.Action == policy.ActionAllow && !p.DryRun
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", visible(p.Kind+" "+p.Namespace+"/"+p.Name), visible(action), p.Selects, p.Rules, p.State)
	}
	if !allows && len(s.refused) == 0 {
		fmt.Fprintln(t, "None of them is an ALLOW policy: what is not denied is allowed.")
	}
}
