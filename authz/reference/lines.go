package reference

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"castellan.dev/api/policy"
	"castellan.dev/authz"
)

// columnAction is where a line says which action it stands for.
const columnAction = 1

// lines writes policy as casbin lines, in the order in which they decide.
func lines(cfg authz.Config) [][]string {
	if cfg.DenyAll != "" {
		return [][]string{line("deny", "", cfg.DenyAll, "all", "no", "", policy.Source{}, policy.Operation{}, nil)}
	}
	var custom, deny, allow [][]string
	defaultDeny := false
	for i, doc := range cfg.Documents {
		if !selects(doc, cfg) {
			continue
		}
		p := doc.Authorization
		dryRun, marked := doc.Metadata.Annotations["istio.io/dry-run"]
		switch p.Action {
		case policy.ActionAudit:
		case policy.ActionCustom:
			custom = append(custom, documentLines(i, doc, policy.ActionCustom, "deny")...)
		case policy.ActionAllow, "":
			if dryRun == "true" {
				continue
			}
			defaultDeny = true
			if !marked {
				allow = append(allow, documentLines(i, doc, policy.ActionAllow, "allow")...)
			}
		default: // DENY, and every action nobody knows
			if dryRun == "true" && p.Action == policy.ActionDeny {
				continue
			}
			deny = append(deny, documentLines(i, doc, policy.ActionDeny, "deny")...)
		}
	}
	// One line stands last and matches everything. Where there are ALLOW policies
	// it denies, as the effect would by itself: but casbin asked about no lines at
	// all tries its matcher on an empty one, and allows.
	last := line("allow", "", "", "no ALLOW policy", "no", "", policy.Source{}, policy.Operation{}, nil)
	if defaultDeny {
		last = line("deny", "", "", "no ALLOW rule", "no", "", policy.Source{}, policy.Operation{}, nil)
	}
	return append(slices.Concat(custom, deny, allow), last)
}

// selects is rules 1 and 2.
func selects(doc policy.Document, cfg authz.Config) bool {
	root := cfg.Mesh.RootNamespace
	if root == "" {
		root = "castellan-system"
	}
	ns := doc.Metadata.Namespace
	p := doc.Authorization
	if doc.Kind != policy.KindAuthorization || p == nil || p.TargetRef != nil || len(p.TargetRefs) > 0 {
		return false
	}
	if ns != root && ns != cfg.Workload.Account.Namespace() {
		return false
	}
	if p.Selector == nil {
		return true
	}
	for key, value := range p.Selector.MatchLabels {
		if have, ok := cfg.Workload.Labels[key]; !ok || have != value {
			return false
		}
	}
	return true
}

func documentLines(number int, doc policy.Document, action, eft string) [][]string {
	p := doc.Authorization
	rules := p.Rules
	unknown := p.Action != "" && p.Action != policy.ActionAllow && p.Action != policy.ActionDeny && p.Action != policy.ActionCustom
	if unknown || eft == "deny" && len(rules) == 0 {
		rules = []policy.Rule{{}}
	}
	name := doc.Metadata.Namespace + "/" + doc.Metadata.Name
	var rows [][]string
	for i, rule := range rules {
		sound, whole := soundRule(rule)
		if eft == "allow" && !whole {
			continue
		}
		http := "no"
		if needsHTTP(rule) {
			http = "yes"
		}
		for f, from := range sources(sound) {
			for t, to := range operations(sound) {
				id := fmt.Sprintf("%d.%d.%d.%d", number, i, f, t)
				rows = append(rows, line(eft, action, name, id, http, doc.Metadata.Namespace, from, to, sound.When))
			}
		}
	}
	return rows
}

// sources lists what a rule's from asks for; without from, one that asks nothing.
func sources(r policy.Rule) []policy.Source {
	if len(r.From) == 0 {
		return []policy.Source{{}}
	}
	var all []policy.Source
	for _, f := range r.From {
		all = append(all, *f.Source)
	}
	return all
}

func operations(r policy.Rule) []policy.Operation {
	if len(r.To) == 0 {
		return []policy.Operation{{}}
	}
	var all []policy.Operation
	for _, t := range r.To {
		all = append(all, *t.Operation)
	}
	return all
}

func line(eft, action, name, id, http, namespace string, s policy.Source, o policy.Operation, when []policy.Condition) []string {
	conditions := ""
	if len(when) > 0 {
		conditions = encode(when)
	}
	return []string{
		eft, action, name, id, http, namespace,
		list(s.Principals), list(s.NotPrincipals), list(s.RequestPrincipals), list(s.NotRequestPrincipals),
		list(s.Namespaces), list(s.NotNamespaces), list(s.ServiceAccounts), list(s.NotServiceAccounts),
		list(s.TrustDomains), list(s.NotTrustDomains), list(s.IPBlocks), list(s.NotIPBlocks),
		list(s.RemoteIPBlocks), list(s.NotRemoteIPBlocks),
		list(o.Hosts), list(o.NotHosts), list(o.Ports), list(o.NotPorts),
		list(o.Methods), list(o.NotMethods), list(o.Paths), list(o.NotPaths),
		conditions,
	}
}

func list(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return encode(values)
}

func encode(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		// Strings and structs of strings always marshal.
		return ""
	}
	return string(b)
}

// needsHTTP is rule 19: fields that only HTTP has.
func needsHTTP(r policy.Rule) bool {
	for _, f := range r.From {
		if s := f.Source; s != nil && len(s.RequestPrincipals)+len(s.NotRequestPrincipals) > 0 {
			return true
		}
	}
	for _, t := range r.To {
		if o := t.Operation; o != nil && len(o.Hosts)+len(o.NotHosts)+len(o.Methods)+len(o.NotMethods)+len(o.Paths)+len(o.NotPaths) > 0 {
			return true
		}
	}
	for _, c := range r.When {
		if strings.HasPrefix(c.Key, "request.") {
			return true
		}
	}
	return false
}
