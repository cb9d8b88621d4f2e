package hostnet

import (
	"strings"
	"testing"
)

// What the kernel says of a neighbour table: numbers of all CPUs are added, the entries are those of the table.
func TestNeighbourStat(t *testing.T) {
	const names = "entries  allocs   destroys hash_grows table_fulls\n"
	for _, c := range []struct {
		name, text string
		want       NeighbourTable
		fails      bool
	}{
		{name: "two CPUs", text: names + "0000001a 1 2 3 00000010\n0000001a 1 2 3 0000000b\n", want: NeighbourTable{Entries: 26, Refused: 27}},
		{name: "no column of refusals", text: "entries allocs\n1 2\n", fails: true},
		{name: "empty", fails: true},
		{name: "a number too few", text: names + "1 2 3 4\n", fails: true},
		{name: "not a number", text: names + "1 2 3 4 x\n", fails: true},
		{name: "a negative number of entries", text: names + "-1 2 3 4 5\n", fails: true},
	} {
		got, err := parseNeighbourStat(strings.NewReader(c.text))
		if (err != nil) != c.fails || err == nil && got != c.want {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
	p := NeighbourTable{Family: "IPv6", Entries: 1100, Limit: 1024}.Problem()
	if !strings.Contains(p.What, "1100 entries") || p.Command != "sysctl -w net.ipv6.neigh.default.gc_thresh3=4096 net.ipv6.neigh.default.gc_thresh2=2048" {
		t.Errorf("%+v", p)
	}
	for _, table := range NeighbourTables() { // of this kernel, where they can be read
		if table.Limit <= 0 || table.Entries < 0 {
			t.Errorf("%+v", table)
		}
	}
}
