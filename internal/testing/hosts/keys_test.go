package hosts_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// A host is down while the key is rotated, by an agent that has started since. It has to be named, because it is locked out without
// the new key.
func TestRotationNamesAHostThatDiedBefore(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	sw := n.Switch()
	var agents []*hosts.Agent
	var starts []func() *hosts.Agent
	for i, name := range []string{"a", "b", "c"} {
		h := n.Host(name)
		h.Plug(sw, "eth0", fmt.Sprintf("10.0.1.%d/24", 11+i))
		args := []string{"--join", "10.0.1.11", "--gossip-key-file", h.WriteFile("key", base64.StdEncoding.EncodeToString(make([]byte, api.KeySize)))}
		if i == 0 {
			args = append(args, "--bootstrap", "--cluster-cidr", "10.244.0.0/16")
		}
		starts = append(starts, func() *hosts.Agent { return h.Agent(args...) })
		agents = append(agents, starts[i]())
		agents[i].Ready(30 * time.Second)
	}
	hosts.Within(t, 20*time.Second, "b knows c", func() error { _, err := peerOf(agents[1], "c"); return err })
	agents[2].Kill()
	hosts.Within(t, 40*time.Second, "c is dead for a", func() error {
		p, err := peerOf(agents[0], "c")
		if err == nil && p.State != api.PeerDead {
			err = errors.New(p.State)
		}
		return err
	})
	agents[1].Stop()
	agents[1] = starts[1]()
	agents[1].Ready(30 * time.Second)
	hosts.Within(t, 20*time.Second, "b knows a, and that c is dead", func() error {
		for name, want := range map[string]string{"a": api.PeerAlive, "c": api.PeerDead} {
			if p, err := peerOf(agents[1], name); err != nil || p.State != want {
				return fmt.Errorf("%s is %q, %v", name, p.State, err)
			}
		}
		return nil
	})

	next := agents[1].Host.WriteFile("next", base64.StdEncoding.EncodeToString([]byte(strings.Repeat("k", api.KeySize))))
	did := func(code int, words string, args ...string) {
		t.Helper()
		out, errs, got := agents[1].Tulle(args...)
		for word := range strings.SplitSeq(words, ", ") {
			if got != code || !strings.Contains(out, word) {
				t.Errorf("%v ends with %d and does not say %q: %s%s", args, got, word, out, errs)
			}
		}
	}
	did(1, "on 2 of 3 members, c (, not alive", "keys", "install", next)
	list, err := agents[1].Client.Keys(t.Context())
	if err != nil || len(list.Keys) != 2 || list.Members != 3 || list.Answered != 2 || len(list.Silent) != 1 || list.Silent[0].Name != "c" {
		t.Fatalf("%+v, %v", list, err)
	}
	old, fresh := list.Keys[0].ID, list.Keys[1].ID
	if list.Keys[1].Primary {
		old, fresh = fresh, old
	}
	did(1, "on 2 of 3 members, c (, not alive", "keys", "use", fresh)
	did(1, "on 2 of 3 members, c (, not alive", "keys", "remove", old)

	// A host that was forgotten is missed no more.
	hosts.Within(t, 20*time.Second, "c is forgotten", func() error {
		if _, errs, code := agents[1].Tulle("forget", "c"); code != 0 {
			return fmt.Errorf("%d: %s", code, errs)
		}
		return nil
	})
	did(0, "on 2 of 2 members", "keys", "use", fresh)
}
