package keyring

import (
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"
)

func newKey(t testing.TB) []byte {
	t.Helper()
	key, err := Parse(Generate())
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
	good := Generate()
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
		"emptied":         {"", 0o600, "copy the file from another node"},
		"only comments":   {"# nothing\n", 0o600, "tulle keys generate"},
		"not base64":      {"# x\nhello world\n", 0o600, "line 2"},
		"cut short":       {good[:30], 0o600, "copy the file from another node"},
		"AES-128":         {base64.StdEncoding.EncodeToString(make([]byte, 16)), 0o600, "16 bytes"},
		"of 16 bytes":     {base64.StdEncoding.EncodeToString(make([]byte, 16)), 0o600, "copy the file from another node"},
		"too many":        {strings.Repeat("x", 0) + manyKeys(MaxKeys+1), 0o600, "limit"},
		"huge":            {strings.Repeat("#", maxFile+1), 0o600, "larger"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "k")
			if err := os.WriteFile(path, []byte(tc.text), tc.mode); err != nil {
				t.Fatal(err)
			}
			k, err := Load(path)
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
	if _, err := Load(filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(err.Error(), "tulle keys generate") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(t.TempDir()); err == nil {
		t.Error("a directory is no keyring")
	}
}

func manyKeys(n int) string {
	var b strings.Builder
	for range n {
		fmt.Fprintln(&b, Generate())
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
	k, err := Load(link)
	if err != nil {
		t.Fatal(err)
	}
	fp1, fp2 := FingerprintOf(first), FingerprintOf(second)
	check := func(want ...Fingerprint) {
		t.Helper()
		again, err := Load(link)
		if err != nil {
			t.Fatal(err)
		}
		for _, ring := range []*Ring{k, again} {
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
	refused(k.Use(fp2), "not installed")
	refused(k.Install([]byte("short")), "32")
	ok(k.Install(second))
	ok(k.Install(second))
	check(fp1, fp2)
	ok(k.Use(fp2))
	check(fp2, fp1)
	refused(k.Remove(fp2), "primary")
	ok(k.Remove(fp1))
	ok(k.Remove(fp1))
	check(fp2)

	// A file that cannot be written changes nothing.
	if err := os.RemoveAll(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	refused(k.Install(first), link)
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
			pool[i] = make([]byte, Size)
			pool[i][0] = byte(i)
		}
		k, err := New(pool[0])
		if err != nil {
			t.Fatal(err)
		}
		m := &modelRing{t: t}
		if err := k.Attach(func(keys [][]byte, _ []byte) (Live, error) { m.keys = keys; return m, nil }); err != nil {
			t.Fatal(err)
		}
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			key := pool[rapid.IntRange(0, len(pool)-1).Draw(t, "key")]
			switch rapid.IntRange(0, 2).Draw(t, "operation") {
			case 0:
				_ = k.Install(key)
			case 1:
				_ = k.Use(FingerprintOf(key))
			case 2:
				_ = k.Remove(FingerprintOf(key))
			}
			m.check()
			want := k.Keys()
			if len(want) != len(m.keys) || want[0].Fingerprint != FingerprintOf(m.keys[0]) {
				t.Fatalf("keyring has %v, memberlist %d keys, primary %v", want, len(m.keys), FingerprintOf(m.keys[0]))
			}
			for _, info := range want {
				if index(m.keys, info.Fingerprint) < 0 {
					t.Fatalf("memberlist lacks %v", info.Fingerprint)
				}
			}
		}
	})
}

// In the sandbox of the unit a directory outside /etc/tulle is read-only, though its file system is not.
func TestUnwrittenReadOnly(t *testing.T) {
	k := &Ring{path: "/srv/keys/gossip.key"}
	if err := k.unwritten(syscall.EROFS); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "ReadWritePaths=/srv/keys ") {
		t.Error(err)
	}
	if err := k.unwritten(syscall.EACCES); strings.Contains(err.Error(), "ReadWritePaths") {
		t.Error(err)
	}
}
