package gossip

import (
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

func newKey(t *testing.T) []byte {
	key, err := keyring.Parse(keyring.Generate())
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keyFile(t *testing.T, key []byte) string {
	path := filepath.Join(t.TempDir(), "gossip.key")
	if err := os.WriteFile(path, []byte(base64.StdEncoding.EncodeToString(key)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestWrongAndMissingKeys(t *testing.T) {
	leakCheck(t)
	k1, _ := keyring.New(newKey(t))
	k2, _ := keyring.New(newKey(t))
	a := launch(t, "a", ring(k1), cluster(membership.NewClusterID()))
	plain := launch(t, "plain", cluster(membership.NewClusterID()))

	wrong := launch(t, "wrong", ring(k2), seeds(a.addr))
	eventually(t, "the wrong key is explained", func() bool {
		return wrong.hasProblem(a.addr.String(), "another gossip key", "--gossip-key-file")
	})
	none := launch(t, "none", seeds(a.addr))
	eventually(t, "the missing key is explained", func() bool {
		return none.hasProblem(a.addr.String(), "this node has none", "--gossip-key-file")
	})
	keyed := launch(t, "keyed", ring(k2), seeds(plain.addr))
	eventually(t, "the seed's missing key is explained", func() bool {
		return keyed.hasProblem(plain.addr.String(), "without a gossip key", "--gossip-key-file")
	})
	eventually(t, "the keyed member counts what it cannot open", func() bool {
		return a.Stats().Undecryptable > 0 && a.hasProblem("no key of this node opens", "127.", "tulle keys list", "copy the key file of a member", "restart its agent")
	})
	for _, n := range []*node{wrong, none, keyed, a, plain} {
		if len(n.Gossip.Members()) != 0 {
			t.Errorf("%s has members", n.name)
		}
	}
	for n, to := range map[*node]*node{wrong: a, none: a, keyed: plain} {
		if !n.OtherKey(to.addr) || n.OtherKey(n.addr) {
			t.Errorf("%s: %s has another key: %v", n.name, to.name, n.OtherKey(to.addr))
		}
	}
	if _, err := none.KeyList(t.Context()); err != ErrNoKeyring {
		t.Errorf("key operation without a key: %v", err)
	}
}

// A removal that did not reach every member can be repeated on one that it has reached, where the key is gone.
func TestRemovalIsRepeated(t *testing.T) {
	leakCheck(t)
	k1, k2 := newKey(t), newKey(t)
	one, err := keyring.New(k1)
	if err != nil {
		t.Fatal(err)
	}
	two, err := keyring.New(k1, k2)
	if err != nil {
		t.Fatal(err)
	}
	id := membership.NewClusterID()
	a := launch(t, "a", ring(one), cluster(id))
	b := launch(t, "b", ring(two), cluster(id), seeds(a.addr))
	converge(t, a, b)
	fp, err := a.FindKey(t.Context(), keyring.FingerprintOf(k2).String())
	if err != nil || fp != keyring.FingerprintOf(k2) {
		t.Fatalf("a key of another member: %v, %v", fp, err)
	}
	if r, err := a.KeyRemove(t.Context(), fp); err != nil || r.Err() != nil || len(two.Keys()) != 1 {
		t.Errorf("%+v, %v; b has %d keys", r, err, len(two.Keys()))
	}
	if _, err := a.FindKey(t.Context(), keyring.FingerprintOf(k2).String()); err == nil || !strings.Contains(err.Error(), "tulle keys list") {
		t.Errorf("a key that nobody has: %v", err)
	}
}

func TestKeyRotation(t *testing.T) {
	leakCheck(t)
	oldKey, newKeyBytes, spare := newKey(t), newKey(t), newKey(t)
	oldFP, newFP := keyring.FingerprintOf(oldKey), keyring.FingerprintOf(newKeyBytes)
	id := membership.NewClusterID()
	var nodes []*node
	var paths []string
	for i := range 5 {
		path := keyFile(t, oldKey)
		k, err := keyring.Load(path)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
		opts := []option{patient, ring(k), cluster(id)}
		if i > 0 {
			opts = append(opts, seeds(nodes[0].addr))
		}
		nodes = append(nodes, launch(t, fmt.Sprint("n", i), opts...))
	}
	converge(t, nodes...)

	// Everybody talks to everybody all the time.
	stop := make(chan struct{})
	var wg sync.WaitGroup
	sent := make([]map[string]int, len(nodes)) // by sender: message → receiver
	for i, from := range nodes {
		sent[i] = map[string]int{}
		wg.Go(func() {
			for j := 0; ; j++ {
				select {
				case <-stop:
					return
				case <-time.After(2 * time.Millisecond):
				}
				to := (i + 1 + rand.IntN(len(nodes)-1)) % len(nodes)
				msg := fmt.Sprintf("%d", j)
				if err := from.Send(t.Context(), nodes[to].cfg.ID, []byte(msg)); err != nil {
					t.Errorf("send: %v", err)
					return
				}
				sent[i][msg] = to
				if !from.sees(nodes...) {
					t.Errorf("%s has lost a member", from.name)
					return
				}
			}
		})
	}
	stopped := false
	halt := func() {
		if !stopped {
			stopped = true
			close(stop)
			wg.Wait()
		}
	}
	defer halt()

	step := func(what string, r KeyReport, err error) {
		t.Helper()
		if err == nil {
			err = r.Err()
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if len(r.Answers) != len(nodes) || r.Answers[0].Name != "n2" {
			t.Fatalf("%s: %d answers: %+v", what, len(r.Answers), r.Answers)
		}
	}
	leader := nodes[2]
	if _, err := leader.KeyUse(t.Context(), newFP); err == nil || !strings.Contains(err.Error(), "not installed") {
		t.Errorf("use before install: %v", err)
	}
	r, err := leader.KeyInstall(t.Context(), newKeyBytes)
	step("install", r, err)
	r, err = leader.KeyInstall(t.Context(), spare)
	step("install another", r, err)
	if _, err := leader.KeyRemove(t.Context(), oldFP); err == nil || !strings.Contains(err.Error(), "primary") {
		t.Errorf("remove of the primary: %v", err)
	}
	if fp, err := leader.FindKey(t.Context(), newFP.String()[:6]); err != nil || fp != newFP {
		t.Errorf("FindKey: %v, %v", fp, err)
	}
	r, err = leader.KeyUse(t.Context(), newFP)
	step("use", r, err)
	r, err = leader.KeyRemove(t.Context(), oldFP)
	step("remove", r, err)
	r, err = leader.KeyList(t.Context())
	step("list", r, err)
	for _, a := range r.Answers {
		if len(a.Keys) != 2 || a.Keys[0] != (keyring.Info{Fingerprint: newFP, Primary: true}) {
			t.Errorf("%s has keys %+v", a.Name, a.Keys)
		}
	}
	halt()
	for i, from := range nodes {
		if len(sent[i]) == 0 {
			t.Error("nothing was sent")
		}
		for msg, to := range sent[i] {
			n := nodes[to]
			eventually(t, "message arrives", func() bool { return n.times(n.messages, from.cfg.ID.Short()+" "+msg) > 0 })
		}
		if s := from.Stats(); s.Undecryptable != 0 || s.Dropped != 0 {
			t.Errorf("%s: %+v", from.name, s)
		}
	}
	for _, p := range paths {
		k, err := keyring.Load(p)
		if err != nil || len(k.Keys()) != 2 || k.Keys()[0].Fingerprint != newFP {
			t.Errorf("key file after rotation: %v", err)
		}
	}

	// A member that cannot write its file says no, and use is refused for all.
	if err := os.RemoveAll(filepath.Dir(paths[4])); err != nil {
		t.Fatal(err)
	}
	r, err = leader.KeyInstall(t.Context(), oldKey)
	if err == nil {
		err = r.Err()
	}
	if err == nil || !strings.Contains(err.Error(), "n4") || !strings.Contains(err.Error(), paths[4]) {
		t.Errorf("install that fails on one: %v", err)
	}
	if _, err := leader.KeyUse(t.Context(), oldFP); err == nil || !strings.Contains(err.Error(), "n4") {
		t.Errorf("use of a key that one lacks: %v", err)
	}
	// A member that is gone is not asked.
	nodes[4].stop()
	eventually(t, "n4 is dead", func() bool { m, _ := leader.Member(nodes[4].cfg.ID); return m.State == StateDead })
	r, err = leader.KeyList(t.Context())
	if err != nil || r.Err() != nil || len(r.Answers) != 4 {
		t.Errorf("list with a dead member: %+v, %v", r, err)
	}
}
