package capture

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
)

// perMessage bounds the elements of one message, whose length is 16 bits.
const perMessage = 256

// answers is the room for the kernel's answers, of which there is one to each message.
const answers = 1 << 20

func open() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error { return c.SetReadBuffer(answers) }))
}

// install puts the programs in the place of any before, in one transaction: all
// of it is in force at once, or none and what was before stays.
func install(programs []*program) error {
	conn, err := open()
	if err != nil {
		return err
	}
	for _, p := range programs {
		// Added so that it can be deleted whether or not there was one.
		conn.AddTable(p.table)
		conn.DelTable(p.table)
		conn.AddTable(p.table)
		for _, s := range p.sets {
			if err := conn.AddSet(s.Set, nil); err != nil {
				return fmt.Errorf("set %s: %w", s.Name, err)
			}
			for chunk := range slices.Chunk(elements(s.spans), perMessage) {
				if err := conn.SetAddElements(s.Set, chunk); err != nil {
					return fmt.Errorf("set %s: %w", s.Name, err)
				}
			}
		}
		for _, c := range p.chains {
			conn.AddChain(c)
		}
		for _, r := range p.rules {
			conn.AddRule(r)
		}
	}
	return conn.Flush()
}

// remove deletes the tables of either family that are there.
func remove() error {
	conn, err := open()
	if err != nil {
		return err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return err
	}
	for _, t := range tables {
		if t.Name == tableName && (t.Family == ipv4.nft || t.Family == ipv6.nft) {
			conn.DelTable(t)
		}
	}
	return conn.Flush()
}

// verify reads a table back and compares: what the kernel took may not be what
// it has by now.
func verify(p *program) error {
	conn, err := open()
	if err != nil {
		return err
	}
	chains, err := conn.ListChainsOfTableFamily(p.family.nft)
	if err != nil {
		return err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != tableName })
	if len(chains) != len(p.chains) {
		return fmt.Errorf("%s has %d chains, want %d", p.family.name, len(chains), len(p.chains))
	}
	for _, want := range p.chains {
		at := slices.IndexFunc(chains, func(c *nftables.Chain) bool { return c.Name == want.Name })
		if at < 0 || !sameHook(chains[at], want) {
			return fmt.Errorf("%s: chain %s is missing or another", p.family.name, want.Name)
		}
		rules, err := conn.GetRules(p.table, want)
		if err != nil {
			return fmt.Errorf("%s: chain %s: %w", p.family.name, want.Name, err)
		}
		if err := sameRules(rules, p.rules, want.Name); err != nil {
			return fmt.Errorf("%s: chain %s: %w", p.family.name, want.Name, err)
		}
	}
	for _, s := range p.sets {
		got, err := conn.GetSetElements(s.Set)
		if err != nil {
			return fmt.Errorf("%s: set %s: %w", p.family.name, s.Name, err)
		}
		if !sameElements(got, elements(s.spans)) {
			return fmt.Errorf("%s: set %s holds something else", p.family.name, s.Name)
		}
	}
	return nil
}

func sameHook(got, want *nftables.Chain) bool {
	if want.Hooknum == nil || got.Hooknum == nil {
		return want.Hooknum == got.Hooknum
	}
	return *got.Hooknum == *want.Hooknum && got.Priority != nil && *got.Priority == *want.Priority && got.Type == want.Type
}

func sameRules(got, all []*nftables.Rule, chain string) error {
	want := slices.DeleteFunc(slices.Clone(all), func(r *nftables.Rule) bool { return r.Chain.Name != chain })
	if len(got) != len(want) {
		return fmt.Errorf("%d rules, want %d", len(got), len(want))
	}
	for i, r := range got {
		if !slices.EqualFunc(r.Exprs, want[i].Exprs, sameExpr) {
			return fmt.Errorf("rule %d is another", i)
		}
	}
	return nil
}

// sameExpr compares without what only names something within a transaction.
func sameExpr(got, want expr.Any) bool {
	if l, ok := want.(*expr.Lookup); ok {
		named := *l
		named.SetID = 0
		want = &named
	}
	if l, ok := got.(*expr.Lookup); ok {
		named := *l
		named.SetID = 0
		got = &named
	}
	return reflect.DeepEqual(got, want)
}

// sameElements compares in whatever order the kernel gives them.
func sameElements(got, want []nftables.SetElement) bool {
	order := func(a, b nftables.SetElement) int {
		if d := bytes.Compare(a.Key, b.Key); d != 0 || a.IntervalEnd == b.IntervalEnd {
			return d
		}
		if a.IntervalEnd {
			return -1
		}
		return 1
	}
	got, want = slices.Clone(got), slices.Clone(want)
	slices.SortFunc(got, order)
	slices.SortFunc(want, order)
	return slices.EqualFunc(got, want, func(a, b nftables.SetElement) bool {
		return bytes.Equal(a.Key, b.Key) && a.IntervalEnd == b.IntervalEnd
	})
}
