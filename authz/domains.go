package authz

import (
	"slices"
	"strings"

	"castellan.dev/api/policy"
)

// clusterLocal in a principal stands for the mesh's own trust domain.
const clusterLocal = "cluster.local"

// domains are the mesh's trust domain and its aliases: whose identities are one
// (rules 11 and 14).
type domains []string

func newDomains(mesh policy.Mesh, own string) domains {
	td := mesh.TrustDomain
	if td == "" {
		td = own
	}
	if td == "" {
		td = clusterLocal
	}
	return append(domains{td}, mesh.TrustDomainAliases...)
}

// expand returns what a value stands for where the attribute has a trust domain.
func (d domains) expand(a attr, value string) []string {
	switch {
	case a == attrPrincipal:
		return d.principal(value)
	case a == attrTrustDomain && slices.Contains(d, value):
		return d
	default:
		return []string{value}
	}
}

// principal expands a value of five segments whose trust domain is known, stands
// for a known one ("cluster.local") or is a partial wildcard that takes a known
// one. Everything else stays as it is.
func (d domains) principal(v string) []string {
	if strings.Count(v, "/") != 4 {
		return []string{v}
	}
	td, rest, _ := strings.Cut(v, "/")
	if td == "*" || td != clusterLocal && !slices.ContainsFunc(d, func(known string) bool { return takesDomain(td, known) }) {
		return []string{v}
	}
	var out []string
	for _, known := range d {
		p := known + "/" + rest
		// A suffix wildcard goes on taking what it takes; a star anywhere else
		// would be literal.
		if td[0] == '*' && strings.HasSuffix(known, td[1:]) {
			p = v
		}
		if !slices.Contains(out, p) {
			out = append(out, p)
		}
	}
	return out
}

// takesDomain compares a trust domain of a principal, which may be empty, with a
// known one.
func takesDomain(td, known string) bool {
	switch {
	case td == "":
		return false
	case td[0] == '*':
		return strings.HasSuffix(known, td[1:])
	case td[len(td)-1] == '*':
		return strings.HasPrefix(known, td[:len(td)-1])
	default:
		return td == known
	}
}
