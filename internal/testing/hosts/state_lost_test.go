package hosts_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A host loses its state twice while a pod runs: the pod's address is of the node that it was first, and only the second loss leaves no route that
// shows whose space that was. The agent starts both times: the pod is Tulle's.
func TestStateLostTwice(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	a, b, web := n.Host("a"), n.Host("b"), n.Host("web")
	a.Link("eth0", "10.0.1.11/24", b, "eth0", "10.0.1.12/24")
	first := a.Agent("--bootstrap", "--cluster-cidr", "10.244.0.0/16")
	first.Ready(20 * time.Second)
	agent := b.Agent("--join", "10.0.1.11", "--cluster-cidr", "10.244.0.0/16")
	agent.Ready(20 * time.Second)
	out, errs, code := agent.Tulle("pod", "add", "web", "--netns", web.NetnsPath())
	if code != 0 {
		t.Fatalf("exit code %d: %s%s", code, out, errs)
	}
	space := agent.Status().Node.Prefixes[0].String()
	for range 2 {
		agent.Stop()
		b.WipeDisk()
		agent = b.Agent("--join", "10.0.1.11", "--cluster-cidr", "10.244.0.0/16")
		agent.Ready(20 * time.Second)
		hosts.Within(t, 20*time.Second, "no route shows the first node's space as this host's", func() error {
			if routes := b.Run("ip", "route", "show", "type", "unreachable"); strings.Contains(routes, space+" ") {
				return errors.New(routes)
			}
			return nil
		})
	}
	if out, errs, code := agent.Tulle("pod", "del", "web"); code != 0 {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
}
