package podnet

import (
	"maps"
	"reflect"
	"slices"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// What is read of all rules at once is what the library reads of each chain; another table's rules are not ours.
func TestReadRules(t *testing.T) {
	w := newWorld(t)
	if rules, err := w.host.readRules(""); err != nil || len(rules) != 2 {
		t.Fatalf("rules of %d chains, %v, want 2", len(rules), err)
	}
	c, err := w.host.nft()
	check(t, err)
	other := c.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyNetdev})
	c.AddRule(&nftables.Rule{Table: other, Chain: c.AddChain(&nftables.Chain{Name: "c", Table: other}), Exprs: []expr.Any{&expr.Counter{}}})
	check(t, c.Flush())
	have, err := chains(c)
	check(t, err)
	want := map[string][]chainRule{}
	for name, chain := range have {
		rules, err := c.GetRules(table, chain)
		check(t, err)
		for _, r := range rules {
			is := chainRule{comment: string(r.UserData)}
			for _, e := range r.Exprs {
				if n, ok := e.(*expr.Counter); ok {
					is.packets += n.Packets
				}
			}
			want[name] = append(want[name], is)
		}
	}
	all, err := w.host.readRules("")
	check(t, err)
	if !reflect.DeepEqual(all, want) {
		t.Errorf("all at once: %v\nchain by chain: %v", all, want)
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		one, err := w.host.readRules(name)
		check(t, err)
		if !reflect.DeepEqual(one, map[string][]chainRule{name: want[name]}) {
			t.Errorf("chain %s alone: %v\nwant %v", name, one, want[name])
		}
	}
	if none, err := w.host.readRules("nothing"); err != nil || len(none) != 0 {
		t.Errorf("a chain that is not there: %v, %v", none, err)
	}
	check(t, w.host.RemoveAllChecks())
	if none, err := w.host.readRules(""); err != nil || len(none) != 0 {
		t.Errorf("no table: %v, %v", none, err)
	}
}
