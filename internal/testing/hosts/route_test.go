package hosts_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// `tulle route get` of a member's underlay address tells what the host does, and what its pods' packets do; and `tulle capture`
// says who drops what it cannot show.
func TestRouteToAHost(t *testing.T) {
	t.Parallel()
	for paths, want := range map[string][]string{
		"direct": {"those of its pods go directly by eth0", "path direct"},
		"udp":    {"those of its pods take the tunnel by udp", "path udp", "endpoint 10.0.1.12:6080"},
	} {
		t.Run(paths, func(t *testing.T) {
			t.Parallel()
			_, agents := subnet(t, 2, "--paths", paths)
			says := func(words ...string) {
				t.Helper()
				hosts.Within(t, 40*time.Second, fmt.Sprintf("route get says %q", words), func() error {
					out, errs, code := agents[0].Tulle("route", "get", "10.0.1.12")
					text := strings.Join(strings.Fields(out), " ")
					for _, w := range append(words, "outside the cluster", "owner b", "an underlay address of b: the host's own packets take the host's routes") {
						if !strings.Contains(text, w) || code != 0 {
							return fmt.Errorf("exit code %d, no %q in %s%s", code, w, out, errs)
						}
					}
					return nil
				})
			}
			says(want...)
			if paths == "udp" { // a direct path that is the only one stays in use
				agents[1].Kill()
				says("those of its pods, too")
			}
			if out, _, code := agents[0].Tulle("route", "get", "192.0.2.1"); code != 0 || !strings.Contains(out, "the host's own routes decide") || strings.Contains(out, "pods") {
				t.Errorf("an address of nobody's: %d %s", code, out)
			}
			if _, errs, code := agents[0].Tulle("capture", "--reason", "pod_source"); code != 2 || !strings.Contains(errs, "pod_source") || !strings.Contains(errs, "tulle pod list") {
				t.Errorf("capture --reason pod_source: %d %s", code, errs)
			}
		})
	}
}

// A seed has two networks on its interface, and uses the address in the one that a new host does not reach. The new host says so.
func TestNoRouteToTheSeed(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw, a, b := n.Switch(), n.Host("a"), n.Host("b")
	a.Plug(sw, "eth0", "10.0.1.11/24", "192.168.7.11/24")
	b.Plug(sw, "eth0", "192.168.7.12/24")
	first := a.Agent("--bootstrap")
	first.Ready(20 * time.Second)
	second := b.Agent("--join", "192.168.7.11")
	hosts.Within(t, 40*time.Second, "status says that there is no route", func() error {
		if p := second.Problems(); !strings.Contains(p, "no route of this host leads to a at 10.0.1.11") || !strings.Contains(p, "--underlay") {
			return fmt.Errorf("problems: %s", p)
		}
		return nil
	})
	b.IP("route add 10.0.1.0/24 via 192.168.7.11")
	second.Ready(40 * time.Second)
	hosts.NoProblems(t, "with a route", first, second)
}
