package capture

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

const (
	tableName       = "castellan"
	chainPrerouting = "prerouting"
	chainOutput     = "output"
	chainInbound    = "inbound"

	setInboundExcluded   = "inbound_excluded"
	setInboundIncluded   = "inbound_included"
	setOutboundExcluded  = "outbound_excluded"
	setOutboundIncluded  = "outbound_included"
	setAddressesExcluded = "addresses_excluded"
	setAddressesIncluded = "addresses_included"
)

// program is one family's table.
type program struct {
	family family
	table  *nftables.Table
	sets   []*set
	chains []*nftables.Chain
	rules  []*nftables.Rule
}

type set struct {
	*nftables.Set
	spans []span
}

// compile makes the table of the plan. In the chains that the kernel enters only
// a connection's first packet is seen: what becomes of it holds for the rest.
func (p *plan) compile(f family) *program {
	g := &program{family: f, table: &nftables.Table{Name: tableName, Family: f.nft}}
	if p.inbound != 0 {
		inbound := g.chain(chainInbound, nil)
		prerouting := g.chain(chainPrerouting, nftables.ChainHookPrerouting)
		if len(p.inboundExcluded) > 0 {
			g.rule(inbound, "excluded ports", join(port(), g.within(setInboundExcluded, nftables.TypeInetService, portRanges(p.inboundExcluded)), verdict(expr.VerdictReturn)))
		}
		var included []expr.Any
		if len(p.inboundIncluded) > 0 {
			included = join(port(), g.within(setInboundIncluded, nftables.TypeInetService, portRanges(p.inboundIncluded)))
		}
		g.rule(inbound, "to the proxy", join(included, redirect(p.inbound)))
		g.rule(prerouting, "own traffic", join(meta(expr.MetaKeyIIFNAME), equal(loopback()), verdict(expr.VerdictReturn)))
		g.rule(prerouting, "all TCP", join(tcp(), jump(chainInbound)))
	}
	g.output(p)
	return g
}

// output makes the chain of what leaves a process of the pod. Nothing in it
// depends on who asks but for the proxy's uid.
func (g *program) output(p *plan) {
	output := g.chain(chainOutput, nftables.ChainHookOutput)
	toLoopback := join(meta(expr.MetaKeyOIFNAME), equal(loopback()))
	proxys := join(meta(expr.MetaKeySKUID), equal(binary.NativeEndian.AppendUint32(nil, p.uid)))
	through := func(comment string, match ...[]expr.Any) {
		g.rule(output, comment, join(append(match, verdict(expr.VerdictReturn))...))
	}
	through("not TCP", meta(expr.MetaKeyL4PROTO), notEqual([]byte{unix.IPPROTO_TCP}))
	through("loopback addresses", g.loopbackDestination())
	through("from the proxy to its application", toLoopback, g.source(), equal(g.family.appSource.AsSlice()))
	if p.inbound != 0 {
		// The proxy's outbound side has chosen its own pod: it is to meet its inbound
		// side, as from any other pod.
		g.rule(output, "from the proxy to its own pod", join(toLoopback, proxys, jump(chainInbound)))
	}
	through("within the pod", toLoopback)
	through("the proxy's own", proxys)
	if p.outbound == 0 {
		return
	}
	if len(p.outboundExcluded) > 0 {
		through("excluded ports", port(), g.within(setOutboundExcluded, nftables.TypeInetService, portRanges(p.outboundExcluded)))
	}
	if len(p.outboundIncluded) > 0 {
		ports := g.within(setOutboundIncluded, nftables.TypeInetService, portRanges(p.outboundIncluded))
		g.rule(output, "included ports, to the proxy", join(port(), ports, tcpRedirect(p.outbound)))
	}
	if excluded := addressRanges(p.addressesExcluded, g.family); len(excluded) > 0 {
		through("excluded addresses", g.destination(), g.within(setAddressesExcluded, g.family.addressType, excluded))
	}
	switch included := addressRanges(p.addressesIncluded, g.family); {
	case p.portsOnly, len(p.addressesIncluded) > 0 && len(included) == 0:
		// Nothing by address, or only by those of the other family.
	case len(included) > 0:
		g.rule(output, "included addresses, to the proxy",
			join(g.destination(), g.within(setAddressesIncluded, g.family.addressType, included), tcpRedirect(p.outbound)))
	default:
		g.rule(output, "to the proxy", tcpRedirect(p.outbound))
	}
}

// chain adds a chain; with a hook the kernel enters it.
func (g *program) chain(name string, hook *nftables.ChainHook) *nftables.Chain {
	c := &nftables.Chain{Name: name, Table: g.table}
	if hook != nil {
		c.Hooknum, c.Priority, c.Type = hook, nftables.ChainPriorityNATDest, nftables.ChainTypeNAT
	}
	g.chains = append(g.chains, c)
	return c
}

func (g *program) rule(c *nftables.Chain, comment string, exprs []expr.Any) {
	g.rules = append(g.rules, &nftables.Rule{
		Table: g.table, Chain: c, Exprs: exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, comment),
	})
}

// within matches what is in the register against a new set.
func (g *program) within(name string, key nftables.SetDatatype, spans []span) []expr.Any {
	s := &set{Set: &nftables.Set{Table: g.table, Name: name, KeyType: key, Interval: true, ID: uint32(len(g.sets)) + 1}, spans: spans}
	g.sets = append(g.sets, s)
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: name, SetID: s.ID}}
}

func (g *program) source() []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: g.family.source, Len: g.family.addr}}
}

func (g *program) destination() []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: g.family.destination, Len: g.family.addr}}
}

// loopbackDestination: 127.0.0.0/8, by its first byte, or ::1.
func (g *program) loopbackDestination() []expr.Any {
	if g.family.addr == 16 {
		return join(g.destination(), equal(netip.IPv6Loopback().AsSlice()))
	}
	return join([]expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: g.family.destination, Len: 1}}, equal([]byte{127}))
}

// The rest are the expressions that rules are made of; register 1 holds what is compared.

func join(parts ...[]expr.Any) (out []expr.Any) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func meta(key expr.MetaKey) []expr.Any { return []expr.Any{&expr.Meta{Key: key, Register: 1}} }

func equal(data []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

func notEqual(data []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: data}}
}

// loopback is the interface's name as the kernel compares it.
func loopback() []byte {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "lo")
	return name
}

func tcp() []expr.Any { return join(meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_TCP})) }

// port loads the TCP destination port.
func port() []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

func jump(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func redirect(to uint16) []expr.Any {
	return []expr.Any{&expr.Immediate{Register: 1, Data: bigEndian(to)}, &expr.Redir{
		// As the kernel gives it back.
		RegisterProtoMin: 1, RegisterProtoMax: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED,
	}}
}

// tcpRedirect says TCP once more: the kernel wants to know what a port is of.
func tcpRedirect(to uint16) []expr.Any { return join(tcp(), redirect(to)) }
