package membership

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

	"pgregory.net/rapid"
)

func newKey(t testing.TB) []byte {
	t.Helper()
	key, err := ParseKey(GenerateKey())
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keyFile(t testing.TB, keys ...[]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gossip.key")
	var text strings.Builder
	for _, k := range keys {
		fmt.Fprintln(&text, base64.StdEncoding.EncodeToString(k))
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoadKeyring(t *testing.T) {
	good := GenerateKey()
	for name, tc := range map[string]struct {
		text string
		mode os.FileMode
		says string // "": loads
	}{
		"one key":         {good + "\n", 0o600, ""},
		"no newline":      {good, 0o400, ""},
		"comments":        {"# a\n\n  " + good + "  \r\n# b\n", 0o600, ""},
		"readable by all": {good, 0o644, "chmod 600"},
		"by the group":    {good, 0o640, "chmod 600"},
		"empty":           {"", 0o600, "tulle keys generate"},
		"only comments":   {"# nothing\n", 0o600, "tulle keys generate"},
		"not base64":      {"# x\nhello world\n", 0o600, "line 2"},
		"AES-128":         {base64.StdEncoding.EncodeToString(make([]byte, 16)), 0o600, "16 bytes"},
		"too many":        {strings.Repeat("x", 0) + manyKeys(maxKeys+1), 0o600, "limit"},
		"huge":            {strings.Repeat("#", maxKeyringFile+1), 0o600, "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "k")
			if err := os.WriteFile(path, []byte(tc.text), tc.mode); err != nil {
				t.Fatal(err)
			}
			k, err := LoadKeyring(path)
			switch {
			case tc.says == "" && err != nil:
				t.Error(err)
			case tc.says == "" && len(k.Keys()) != 1:
				t.Errorf("%d keys", len(k.Keys()))
			case tc.says != "" && (err == nil || !strings.Contains(err.Error(), tc.says) || !strings.Contains(err.Error(), path)):
				t.Errorf("got %v, wants %q and the path", err, tc.says)
			}
			if err != nil && strings.Contains(err.Error(), good) {
				t.Error("the error tells the key")
			}
		})
	}
	if _, err := LoadKeyring(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "tulle keys generate") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := LoadKeyring(t.TempDir()); err == nil {
		t.Error("a directory is no keyring")
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for range n {
		fmt.Fprintln(&b, GenerateKey())
	}
	return b.String()
}

func TestKeyringOnDisk(t *testing.T) {
	first, second := newKey(t), newKey(t)
	path := keyFile(t, first)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	k, err := LoadKeyring(link)
	if err != nil {
		t.Fatal(err)
	}
	fp1, fp2 := KeyFingerprint(first), KeyFingerprint(second)
	check := func(want ...Fingerprint) {
		t.Helper()
		again, err := LoadKeyring(link)
		if err != nil {
			t.Fatal(err)
		}
		for _, ring := range []*Keyring{k, again} {
			var got []Fingerprint
			for _, info := range ring.Keys() {
				got = append(got, info.Fingerprint)
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("keys %v, want %v", got, want)
			}
		}
		if st, _ := os.Lstat(link); st.Mode()&os.ModeSymlink == 0 {
			t.Fatal("the symbolic link has been replaced")
		}
		if files, _ := os.ReadDir(filepath.Dir(path)); len(files) != 1 {
			t.Fatalf("files are left behind: %v", files)
		}
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	refused := func(err error, says string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Fatalf("got %v, wants %q", err, says)
		}
	}
	refused(k.use(fp2), "not installed")
	refused(k.install([]byte("short")), "32")
	ok(k.install(second))
	ok(k.install(second))
	check(fp1, fp2)
	ok(k.use(fp2))
	check(fp2, fp1)
	refused(k.remove(fp2), "primary")
	ok(k.remove(fp1))
	ok(k.remove(fp1))
	check(fp2)

	// A file that cannot be written changes nothing.
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	refused(k.install(first), link)
	if len(k.Keys()) != 1 {
		t.Error("a key that is not on disk is in use")
	}
}

// modelRing is memberlist.Keyring's behaviour, with its in-place removal made
// into a failure: what readers hold must never be written to.
type modelRing struct {
	t    *rapid.T
	keys [][]byte
	held [][]string // what readers saw
	refs [][][]byte
}

func (m *modelRing) reader() {
	var s []string
	for _, k := range m.keys {
		s = append(s, string(k))
	}
	m.held, m.refs = append(m.held, s), append(m.refs, m.keys)
}

func (m *modelRing) check() {
	for i, ref := range m.refs {
		for j, k := range ref {
			if string(k) != m.held[i][j] {
				m.t.Fatal("keys have been moved under a reader")
			}
		}
	}
}

func (m *modelRing) AddKey(k []byte) error { m.keys = append(m.keys, k); m.reader(); return nil }
func (m *modelRing) UseKey(k []byte) error {
	next := [][]byte{k}
	for _, o := range m.keys {
		if string(o) != string(k) {
			next = append(next, o)
		}
	}
	m.keys = next
	m.reader()
	return nil
}
func (m *modelRing) RemoveKey(k []byte) error {
	if string(m.keys[0]) == string(k) {
		return fmt.Errorf("primary")
	}
	for i, o := range m.keys {
		if string(o) == string(k) {
			m.keys = append(m.keys[:i], m.keys[i+1:]...)
			break
		}
	}
	m.keys = append([][]byte(nil), m.keys...)
	m.reader()
	return nil
}

// Property: after any operations memberlist's ring has the keyring's keys, in
// its order, and no array has been changed under a reader.
func TestLiveRingFollows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pool := make([][]byte, 6)
		for i := range pool {
			pool[i] = make([]byte, KeySize)
			pool[i][0] = byte(i)
		}
		k, err := NewKeyring(pool[0])
		if err != nil {
			t.Fatal(err)
		}
		m := &modelRing{t: t}
		if err := k.attach(func(keys [][]byte, _ []byte) (liveRing, error) { m.keys = keys; return m, nil }); err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			key := pool[rapid.IntRange(0, len(pool)-1).Draw(t, "key")]
			switch rapid.IntRange(0, 2).Draw(t, "operation") {
			case 0:
				_ = k.install(key)
			case 1:
				_ = k.use(KeyFingerprint(key))
			case 2:
				_ = k.remove(KeyFingerprint(key))
			}
			m.check()
			want := k.Keys()
			if len(want) != len(m.keys) || want[0].Fingerprint != KeyFingerprint(m.keys[0]) {
				t.Fatalf("keyring has %v, memberlist %d keys, primary %v", want, len(m.keys), KeyFingerprint(m.keys[0]))
			}
			for _, info := range want {
				if indexKey(m.keys, info.Fingerprint) < 0 {
					t.Fatalf("memberlist lacks %v", info.Fingerprint)
				}
			}
		}
	})
}

func TestWrongAndMissingKeys(t *testing.T) {
	leakCheck(t)
	k1, _ := NewKeyring(newKey(t))
	k2, _ := NewKeyring(newKey(t))
	a := launch(t, "a", ring(k1), cluster(NewClusterID()))
	plain := launch(t, "plain", cluster(NewClusterID()))

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
		return a.Stats().Undecryptable > 0 && a.hasProblem("no key of this node opens", "127.", "tulle keys list")
	})
	for _, n := range []*node{wrong, none, keyed, a, plain} {
		if len(n.Gossip.Members()) != 0 {
			t.Errorf("%s has members", n.name)
		}
	}
	if _, err := none.KeyList(t.Context()); err != ErrNoKeyring {
		t.Errorf("key operation without a key: %v", err)
	}
}

func TestKeyRotation(t *testing.T) {
	leakCheck(t)
	oldKey, newKeyBytes, spare := newKey(t), newKey(t), newKey(t)
	oldFP, newFP := KeyFingerprint(oldKey), KeyFingerprint(newKeyBytes)
	id := NewClusterID()
	var nodes []*node
	var paths []string
	for i := range 5 {
		path := keyFile(t, oldKey)
		k, err := LoadKeyring(path)
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
		opts := []option{ring(k), cluster(id)}
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
	if fp, err := leader.FindKey(newFP.String()[:6]); err != nil || fp != newFP {
		t.Errorf("FindKey: %v, %v", fp, err)
	}
	r, err = leader.KeyUse(t.Context(), newFP)
	step("use", r, err)
	r, err = leader.KeyRemove(t.Context(), oldFP)
	step("remove", r, err)
	r, err = leader.KeyList(t.Context())
	step("list", r, err)
	for _, a := range r.Answers {
		if len(a.Keys) != 2 || a.Keys[0] != (KeyInfo{newFP, true}) {
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
		k, err := LoadKeyring(p)
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
	// A member that is gone is listed as missing.
	nodes[4].stop()
	eventually(t, "n4 is dead", func() bool { m, _ := leader.Member(nodes[4].cfg.ID); return m.State == StateDead })
	r, err = leader.KeyList(t.Context())
	if err != nil || r.Err() != nil || len(r.Answers) != 4 || len(r.Missing) != 1 || r.Missing[0].Name != "n4" {
		t.Errorf("list with a dead member: %+v, %v", r, err)
	}
}
