package hostnet

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// NeighbourTable is the kernel's table of one family's neighbours (ARP, NDP), which all network namespaces of a host share.
type NeighbourTable struct {
	Family  string // IPv4 or IPv6
	Entries int    // permanent ones included, which do not count for Limit
	Limit   int    // gc_thresh3; 0 if it cannot be read
	Refused uint64 // neighbours for which there was no room, since the host has booted
}

// NeighbourTables reads those that can be read: none outside the network namespace in which the host has booted.
func NeighbourTables() (out []NeighbourTable) {
	for _, t := range []struct{ family, file, proto string }{{"IPv4", "arp_cache", "ipv4"}, {"IPv6", "ndisc_cache", "ipv6"}} {
		f, err := os.Open("/proc/net/stat/" + t.file)
		if err != nil {
			continue
		}
		table, err := parseNeighbourStat(f)
		_ = f.Close() // of a file that was read
		if err != nil {
			continue
		}
		table.Family = t.family
		if limit, err := readSysctl("net/" + t.proto + "/neigh/default/gc_thresh3"); err == nil {
			table.Limit, _ = strconv.Atoi(limit)
		}
		out = append(out, table)
	}
	return out
}

// parseNeighbourStat reads the kernel's counters of a table: a line of names, and one of hexadecimal numbers for each CPU (net/core/neighbour.c,
// neigh_stat_seq_show). The entries are those of the table in each line.
func parseNeighbourStat(r io.Reader) (t NeighbourTable, err error) {
	lines := bufio.NewScanner(r)
	lines.Scan()
	names := strings.Fields(lines.Text())
	entries, refused := slices.Index(names, "entries"), slices.Index(names, "table_fulls")
	if entries < 0 || refused < 0 {
		return t, fmt.Errorf("no columns entries and table_fulls in %q", lines.Text())
	}
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) != len(names) {
			return t, fmt.Errorf("%d columns in %q, and %d names", len(f), lines.Text(), len(names))
		}
		n, err := strconv.ParseUint(f[entries], 16, 31)
		if err != nil {
			return t, err
		}
		no, err := strconv.ParseUint(f[refused], 16, 64)
		if err != nil {
			return t, err
		}
		t.Entries, t.Refused = int(n), t.Refused+no
	}
	return t, lines.Err()
}

// Problem says that the table refuses neighbours, whether or not it does.
func (t NeighbourTable) Problem() Problem {
	proto := strings.ToLower(t.Family)
	to := max(2*t.Limit, 4096)
	return Problem{
		What: fmt.Sprintf("the %s neighbour table is full: packets to hosts and pods that are not in it are lost (%d entries, permanent ones included; net.%s.neigh.default.gc_thresh3 is %d, for the host and all containers)",
			t.Family, t.Entries, proto, t.Limit),
		Remedy:  "raise gc_thresh3 and gc_thresh2, in a file in /etc/sysctl.d, too (`tulle doctor neighbours` has the command)",
		Command: fmt.Sprintf("sysctl -w net.%s.neigh.default.gc_thresh3=%d net.%s.neigh.default.gc_thresh2=%d", proto, to, proto, to/2),
	}
}
