package ipam

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

func aState(n int) *State {
	st := &State{
		Generation: 7, Node: ID{1}, Cluster: ID{2}, Joined: true,
		Families: []Family{{netip.MustParsePrefix("10.244.0.0/16"), 24}, {netip.MustParsePrefix("fd00::/48"), 64}},
		Table:    []byte{1, 0},
		Blocks:   prefixes("10.244.1.0/24 fd00:0:0:1::/64"),
		Cooling:  []Cooling{{netip.MustParseAddr("10.244.1.9"), t0, "pod"}, {Addr: netip.MustParseAddr("10.244.1.10"), Until: t0}},
		Peers:    []Peer{{ID{3}, "b", netip.MustParseAddrPort("192.0.2.2:7946")}, {ID: ID{4}}},
		Granted:  []Granted{{ID{3}, 99}},
		Promises: []Promise{{ID{4}, ID{3}, t0}},
		Departed: []ID{{9}, {8}},
	}
	a := netip.MustParseAddr("10.244.1.1")
	for i := range n {
		st.Allocations = append(st.Allocations, Allocation{Addr: a, Key: fmt.Sprint("pod", i), Pod: "default/p", Netns: "/run/netns/p", Since: t0})
		a = a.Next()
	}
	return st
}

func open(t *testing.T, dir, stamp string) *Store {
	t.Helper()
	s, err := OpenStore(dir, stamp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStoreKeepsEverything(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "dir")
	s := open(t, dir, "")
	if _, err := s.Load(); !errors.Is(err, ErrNoState) {
		t.Fatal(err)
	}
	for n := range 3 {
		want := aState(n)
		if err := s.Save(want); err != nil {
			t.Fatal(err)
		}
		got, err := s.Load()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("got %+v, %v\nwant %+v", got, err, want)
		}
	}
	if left, _ := filepath.Glob(dir + "/*.tmp"); left != nil {
		t.Error(left)
	}
}

func TestStoreIsLocked(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, "")
	if _, err := OpenStore(dir, ""); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "--state-dir") {
		t.Fatal(err)
	}
	held, err := syscall.Dup(int(s.lock.Fd())) // as a child that is being started has it
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(held)
	s.Close()
	open(t, dir, "")
}

// TestStoreRefusesDamage: whatever bit flips and wherever the file ends, it is
// refused by an error that names file, reason and remedy, and stays as it is.
func TestStoreRefusesDamage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	good, err := EncodeState(aState(2))
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := OpenStore(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		_, err = s.Load()
		if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
			t.Fatalf("%s: %v", name, err)
		}
		if msg := err.Error(); !strings.Contains(msg, path) || !strings.Contains(msg, "Remedy: ") {
			t.Errorf("%s: %v", name, err)
		}
		if err := s.Save(aState(0)); err == nil {
			t.Errorf("%s: a state that could not be read is overwritten", name)
		}
		if now, _ := os.ReadFile(path); !bytes.Equal(now, b) {
			t.Errorf("%s: the file has changed", name)
		}
	}
	for i := 0; i < len(good); i += 1 + i/40 {
		refuse(fmt.Sprintf("truncated to %d", i), good[:i])
		flipped := bytes.Clone(good)
		flipped[i] ^= 1 << (i % 8)
		refuse(fmt.Sprintf("bit flipped in byte %d", i), flipped)
	}
	refuse("longer", append(bytes.Clone(good), '\n'))
}

func TestStoreRefusesNewer(t *testing.T) {
	dir := t.TempDir()
	newer := []byte("tulle-state 2 blake3:00 17 whatever\nstuff")
	if err := os.WriteFile(filepath.Join(dir, "state"), newer, 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, "")
	if _, err := s.Load(); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "install the version") {
		t.Fatal(err)
	}
	if err := s.Save(aState(0)); err == nil {
		t.Fatal("overwritten")
	}
}

// withHeader returns a state file with this JSON and the right checksum.
func withHeader(body string) []byte {
	sum := sha256.Sum256([]byte(body))
	return fmt.Appendf(nil, "tulle-state 1 sha256:%x %d\n%s", sum, len(body), body)
}

// An intact file with a field that this program does not know is not damaged: a later version wrote it.
func TestStoreRefusesUnknownFields(t *testing.T) {
	good, err := EncodeState(aState(1))
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := strings.Cut(string(good), "\n")
	for _, tc := range []struct {
		name, old, new string
		want           error
		says           string
	}{
		{"a field", "{\n", "{\n \"zone\": \"rack 7\",\n", ErrNewer, `"zone"`},
		{"a field of an allocation", `"key": `, `"colour": [1], "key": `, ErrNewer, `"colour"`},
		{"a known field of another type", `"generation": 7`, `"generation": "seven"`, ErrCorrupt, "generation"},
		{"both", `"generation": 7`, `"zone": 1, "generation": "seven"`, ErrCorrupt, "generation"},
		{"no JSON", "{\n", "", ErrCorrupt, ""},
	} {
		changed := strings.Replace(body, tc.old, tc.new, 1)
		if changed == body {
			t.Fatal(tc.name)
		}
		if _, err := DecodeState(withHeader(changed)); !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "state"), withHeader(strings.Replace(body, "{\n", "{\n \"zone\": 7,\n", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir, "")
	if _, err := s.Load(); err == nil || !strings.Contains(err.Error(), "install the version of tulle that wrote it") || strings.Contains(err.Error(), "damaged") {
		t.Errorf("%v", err)
	}
	if err := s.Save(aState(0)); err == nil {
		t.Error("overwritten")
	}
}

// state1 is what the first version of format 1 reads. It refuses a file with any other field as damaged, so a field that is added
// here cannot be read after a downgrade.
type state1 struct {
	Generation  uint64         `json:"generation"`
	Node        ID             `json:"node"`
	Cluster     ID             `json:"cluster"`
	Families    []Family       `json:"families"`
	Joined      bool           `json:"joined"`
	Left        bool           `json:"left"`
	Unsure      bool           `json:"unsure"`
	Table       []byte         `json:"table"`
	Blocks      []netip.Prefix `json:"blocks"`
	Allocations []struct {
		Addr  netip.Addr `json:"addr"`
		Key   string     `json:"key"`
		Pod   string     `json:"pod"`
		Netns string     `json:"netns"`
		Since time.Time  `json:"since"`
	} `json:"allocations"`
	Cooling []struct {
		Addr  netip.Addr `json:"addr"`
		Until time.Time  `json:"until"`
		Key   string     `json:"key"`
	} `json:"cooling"`
	Peers []struct {
		ID   ID             `json:"id"`
		Name string         `json:"name"`
		Addr netip.AddrPort `json:"addr"`
	} `json:"peers"`
	Granted []struct {
		Node ID     `json:"node"`
		Seq  uint64 `json:"seq"`
	} `json:"granted"`
	Promises []struct {
		Victim ID        `json:"victim"`
		To     ID        `json:"to"`
		Until  time.Time `json:"until"`
	} `json:"promises"`
}

// After a downgrade, also where nodes have left or were forgotten: an older version finds nothing that it does not know, and no more
// promises that bind it.
func TestOlderVersionsReadTheState(t *testing.T) {
	st := aState(2)
	st.Left, st.Unsure = true, true
	b, err := EncodeState(st)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := bytes.Cut(b, []byte("\n"))
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	var old state1
	if err := d.Decode(&old); err != nil {
		t.Fatalf("an older version cannot read it: %v", err)
	}
	var bind []Promise
	for _, p := range old.Promises {
		if p.Until.After(t0.Add(-time.Hour)) {
			bind = append(bind, Promise(p))
		}
	}
	if !reflect.DeepEqual(bind, st.Promises) || len(old.Peers) != len(st.Peers) || len(old.Allocations) != 2 {
		t.Errorf("an older version reads %+v", old)
	}
	if got, err := DecodeState(b); err != nil || !reflect.DeepEqual(got, st) {
		t.Errorf("this version reads %+v, %v", got, err)
	}
}

// smallDisk is a file system of 64 KiB.
func smallDisk(t *testing.T, flags uintptr) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a tmpfs")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", flags, "size=64k"); err != nil {
		t.Skipf("mount: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, 0) })
	return dir
}

// TestStoreOnAFullAndAReadOnlyDisk uses a real small file system.
func TestStoreOnAFullAndAReadOnlyDisk(t *testing.T) {
	dir := smallDisk(t, 0)
	s, err := OpenStore(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Load()
	want := aState(3)
	if err := s.Save(want); err != nil {
		t.Fatal(err)
	}
	err = s.Save(aState(2000))
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "free some space") {
		t.Fatalf("full: %v", err)
	}
	if got, err := s.Load(); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("after a full disk: %v", err)
	}
	if err := s.Save(aState(4)); err != nil {
		t.Fatalf("the failed attempt has left the disk full: %v", err)
	}
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Skipf("remount: %v", err)
	}
	if err = s.Save(aState(1)); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "writable") || !strings.Contains(err.Error(), "ReadWritePaths="+dir) {
		t.Fatalf("read-only: %v", err)
	}
}

func TestStoreReadOnlyAtStart(t *testing.T) {
	dir := smallDisk(t, syscall.MS_RDONLY)
	if _, err := OpenStore(dir, ""); !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "writable") || !strings.Contains(err.Error(), "ReadWritePaths="+dir) {
		t.Fatalf("%v", err)
	}
}

// TestStoreReadOnlyWithAState: a node that has a state starts from a disk that is read-only, and says that it cannot save.
func TestStoreReadOnlyWithAState(t *testing.T) {
	dir := smallDisk(t, 0)
	remount := func(flags uintptr) {
		t.Helper()
		if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, dir, "")
	s.Load()
	want := aState(3)
	if err := errors.Join(s.Save(want), s.Check(), s.Close()); err != nil {
		t.Fatal(err)
	}
	remount(syscall.MS_RDONLY)
	s = open(t, dir, "")
	defer s.Close()
	if got, err := s.Load(); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("read-only: %v", err)
	}
	if _, err := OpenStore(dir, ""); !errors.Is(err, ErrLocked) {
		t.Errorf("a second one: %v", err)
	}
	for what, err := range map[string]error{"look": s.Check(), "save": s.Save(aState(4))} {
		if !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "writable") {
			t.Errorf("%s: %v", what, err)
		}
	}
	remount(0)
	if err := errors.Join(s.Check(), s.Save(aState(4))); err != nil {
		t.Errorf("writable again: %v", err)
	}
}

// TestStoreMoved: the next start does not look where this one saves.
func TestStoreMoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s := open(t, dir, "")
	defer s.Close()
	moved := func(when string) {
		t.Helper()
		if err := s.Check(); !errors.Is(err, errMoved) || !strings.Contains(err.Error(), "put "+dir+" back") {
			t.Errorf("%s: %v", when, err)
		}
	}
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	moved("moved")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	moved("another one there")
	if err := errors.Join(os.Remove(dir), os.Symlink(dir+".old", dir)); err != nil {
		t.Fatal(err)
	}
	if err := s.Check(); err != nil {
		t.Errorf("there again, by a symbolic link: %v", err)
	}
	if err := errors.Join(os.Remove(dir), os.RemoveAll(dir+".old")); err != nil {
		t.Fatal(err)
	}
	moved("removed")
}

// TestStoreStamp: only the last save of this boot is fresh, and only for a while after the agent was last alive.
func TestStoreStamp(t *testing.T) {
	dir, run := t.TempDir(), filepath.Join(t.TempDir(), "stamp")
	at := time.Hour // since the boot
	load := func() *Store {
		s := open(t, dir, run)
		s.Load()
		return s
	}
	fresh := func(up time.Duration) bool {
		s := load()
		defer s.Close()
		return s.Fresh(up)
	}
	s := load()
	old := aState(1)
	s.Alive(at) // there is nothing yet that it could confirm
	s.Save(old)
	s.Close()
	if fresh(at) {
		t.Error("fresh, although the agent was never alive")
	}
	s = load()
	s.Save(old)
	s.Alive(at)
	s.Save(old) // the time stays
	s.Close()
	for up, want := range map[time.Duration]bool{at: true, at + FreshFor: true, at + FreshFor + 1: false, at + 100*time.Hour: false, at - time.Minute: false} {
		if got := fresh(up); got != want {
			t.Errorf("last alive at %v, started at %v: fresh %v", at, up, got)
		}
	}

	// A start that is not fresh does not make the next one fresh, however long it lasts; one that is fresh does.
	late := at + FreshFor + time.Minute
	s = load()
	if s.Fresh(late) {
		t.Fatal("fresh")
	}
	s.Alive(late)
	s.Close()
	if fresh(late) {
		t.Error("fresh after a start that was not")
	}
	s = load()
	if !s.Fresh(at + FreshFor) {
		t.Fatal("not fresh")
	}
	s.Alive(late)
	s.Close()
	if !fresh(late) {
		t.Error("not fresh after a start that was")
	}
	at = late

	backup, _ := os.ReadFile(filepath.Join(dir, "state"))
	s = load()
	next := aState(2)
	next.Generation++
	s.Save(next)
	s.Close()
	if !fresh(at) {
		t.Error("what was just saved is not fresh")
	}
	os.WriteFile(filepath.Join(dir, "state"), backup, 0o600)
	if fresh(at) {
		t.Error("an older disk is taken for fresh")
	}
	os.Remove(run) // a reboot
	if fresh(at) {
		t.Error("fresh without a stamp")
	}
	for _, stamp := range []string{"", "\n", "01", "01000000000000000000000000000000 7\n", "01000000000000000000000000000000 7 soon\n"} {
		os.WriteFile(run, []byte(stamp), 0o600) // the third as earlier versions wrote it
		if fresh(0) {
			t.Errorf("fresh with the stamp %q", stamp)
		}
	}
}

func FuzzDecodeState(f *testing.F) {
	good, _ := EncodeState(aState(2))
	f.Add(good)
	_, body, _ := bytes.Cut(good, []byte("\n"))
	f.Add(body)
	f.Fuzz(func(t *testing.T, b []byte) {
		if !bytes.HasPrefix(b, []byte(stateMagic)) { // a body: past the checksum
			sum := sha256.Sum256(b)
			b = append(fmt.Appendf(nil, "%s 1 sha256:%x %d\n", stateMagic, sum, len(b)), b...)
		}
		st, err := DecodeState(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewer) {
				t.Fatal(err)
			}
			return
		}
		if _, err := EncodeState(st); err != nil {
			t.Fatal(err)
		}
	})
}
