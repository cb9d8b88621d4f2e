package clustertest

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/lab"
)

// fields checks that a decoded JSON value has all the paths: "a.b[].c" is c in every element, of which there is at least
// one, of list b in a.
func fields(v any, paths ...string) (missing []string) {
	for _, p := range paths {
		if why := field(v, p); why != "" {
			missing = append(missing, p+": "+why)
		}
	}
	return missing
}

func field(v any, path string) string {
	if path == "" {
		return ""
	}
	name, rest, _ := strings.Cut(path, ".")
	name, list := strings.CutSuffix(name, "[]")
	if name != "" {
		object, ok := v.(map[string]any)
		if !ok {
			return fmt.Sprintf("%T has no fields", v)
		}
		if v, ok = object[name]; !ok {
			return "no field " + name
		}
	}
	if !list {
		return field(v, rest)
	}
	elements, ok := v.([]any)
	if !ok || len(elements) == 0 {
		return fmt.Sprintf("%s is no list with elements: %v", name, v)
	}
	for _, e := range elements {
		if why := field(e, rest); why != "" {
			return why
		}
	}
	return ""
}

// TestOutput holds the field names that scripts read, as a real agent writes them.
func TestOutput(t *testing.T) {
	t.Parallel()
	l := up(t, "out", lab.Options{Nodes: 2})
	settled(t, l)
	pod := pods(l)[1]
	for _, tc := range []struct {
		args  string
		want  []string
		words []string // of the table for people
	}{
		{
			"status", []string{
				"version", "node.name", "node.id", "node.underlay[]", "node.tun.name", "node.tun.mtu", "node.tun.addresses[]", "node.prefixes[]",
				"node.blocks[].prefix", "node.blocks[].used", "node.blocks[].size",
				"cluster.id", "cluster.members", "cluster.alive", "cluster.isolated",
				"peers[].name", "peers[].id", "peers[].state", "peers[].underlay[]", "peers[].prefixes[]",
				"peers[].path.mode", "peers[].path.state", "peers[].path.rtt_us", "peers[].path.loss", "peers[].path.mtu", "peers[].path.since", "peers[].path.reason",
				"peers[].candidates[].mode", "peers[].candidates[].state", "problems",
				"drops.not_member", "drops.bad_encap", "drops.malformed", "drops.nested", "drops.ttl_zero", "drops.source_invalid", "drops.source_not_senders",
				"drops.destination_not_ours", "drops.ecn", "drops.no_owner", "drops.loop", "drops.peer_down", "drops.no_path", "drops.too_big",
			},
			[]string{"h1", "healthy", "tun0", "2 of 2 members alive", "h2"},
		},
		{"peers", []string{"[].name", "[].state", "[].prefixes[]", "[].path.mode", "[].path.rtt_us", "[].since", "[].reason"}, []string{"h2", "alive", "udp", "1472"}},
		{
			"route get " + pod.addr(false).String(), []string{"address", "kind", "prefix", "owner.name", "owner.id", "endpoint", "encapsulation", "mtu", "why", "reachable"},
			[]string{"h2", "192.168.2.12:6080", "udp", "1472"},
		},
		{"ping h2", []string{"node.name", "modes[].mode", "modes[].state", "modes[].rtt_us", "modes[].largest_packet", "modes[].sent", "modes[].lost"}, []string{"udp", "ipip", "1472"}},
		{
			"ipam", []string{"prefixes[]", "blocks[].prefix", "blocks[].used", "blocks[].size", "allocations[].addresses[]", "allocations[].id", "allocations[].state"},
			[]string{"p1a", "10.244."},
		},
		{"ipam show", []string{"prefixes[]"}, nil},
		{"ipam check", []string{"checked", "leaked", "unknown"}, nil},
		{"keys list", []string{"encrypted"}, []string{"not encrypted"}},
	} {
		args := strings.Fields(tc.args)
		r := tulle(t, l, "h1", append(args, "-o", "json")...)
		var v any
		if err := json.Unmarshal([]byte(r.out), &v); err != nil || r.code != 0 || r.err != "" {
			t.Errorf("%s: code %d, %v: %s%s", tc.args, r.code, err, r.out, r.err)
			continue
		}
		if missing := fields(v, tc.want...); len(missing) > 0 {
			t.Errorf("%s: %s\n%s", tc.args, strings.Join(missing, "; "), r.out)
		}
		r = tulle(t, l, "h1", args...)
		if missing := lacks(r.out, tc.words...); r.code != 0 || len(missing) > 0 {
			t.Errorf("%s: code %d, the table lacks %q:\n%s%s", tc.args, r.code, missing, r.out, r.err)
		}
	}
	if r := tulle(t, l, "h1", "route", "get", "192.0.2.1"); len(lacks(r.out, "192.0.2.1", "outside the cluster")) > 0 {
		t.Errorf("route get of an outer address: %+v", r)
	}
	if r := tulle(t, l, "h1", "ping", "nobody"); r.code != 1 || len(lacks(r.err, "nobody", "h2")) > 0 {
		t.Errorf("ping of nobody: %+v", r)
	}
}
