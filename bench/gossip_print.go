package bench

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// Print writes the result as a table for people.
func (r GossipResult) Print(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(what, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", what, fmt.Sprintf(format, args...))
	}
	line("nodes", "%d (%s; %d CPUs)", r.Nodes, r.Transport, r.CPUs)
	line("table", "%d prefixes, %s on the wire", r.Prefixes, size(float64(r.TableBytes)))
	line("all knew all", "after %v, started a few at a time", r.Form.Round(time.Millisecond))
	line("one new entry known to all", "median %.2f s, max %.2f s (%d rounds)", r.LastNode.Median, r.LastNode.Max, r.LastNode.N)
	line("one new entry known to one", "median %.2f s, 99%% %.2f s", r.OneNode.Median, r.OneNode.P99)
	line("sent at rest", "%s/s a node, %.1f packets/s (counted for %v; a push/pull each %v)", size(r.SentPerNode), r.PacketsPerNode, r.Rest.Round(time.Second), r.PushPull)
	line("received at rest", "%s/s a node", size(r.ReceivedPerNode))
	line("largest packet", "%d bytes", r.LargestPacket)
	line("processor at rest", "%.2f %% of a core a node, without the collection of garbage", 100*r.CPUPerNode)
	line("memory", "%s heap and %s stacks a node, %.1f goroutines", size(r.HeapPerNode), size(r.StackPerNode), r.Goroutines)
	line("lookup", "%.1f ns with this table, %.1f ns with 10 prefixes", r.Lookup, r.LookupSmall)
	if r.Unsettled > 0 || r.Dropped > 0 || r.Malformed > 0 {
		line("trouble", "%d members held for dead, %d messages dropped, %d malformed", r.Unsettled, r.Dropped, r.Malformed)
	}
	return t.Flush()
}

// size writes bytes in decimal units.
func size(bytes float64) string {
	switch {
	case bytes >= 1e6:
		return fmt.Sprintf("%.1f MB", bytes/1e6)
	case bytes >= 1e3:
		return fmt.Sprintf("%.1f kB", bytes/1e3)
	}
	return fmt.Sprintf("%.0f B", bytes)
}
