package ipam

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The state file: one line of header, then JSON.
//
//	tulle-state VERSION sha256:HEX LENGTH\n
//	{ … }\n
//
// VERSION is the format version. HEX is the SHA-256 of the JSON, which has LENGTH
// bytes and ends the file. A save writes a temporary file, syncs it, renames it over
// the old one and syncs the directory. So after a crash the file has either the
// old or the new state, never a part of it.
const (
	stateFile    = "state"
	stateTemp    = "state.tmp"
	lockFile     = "lock"
	stateMagic   = "tulle-state"
	stateVersion = 1
	// maxStateSize is the largest file that Load reads, in bytes. It fits several
	// times 65,536 table entries and as many allocations.
	maxStateSize = 256 << 20
)

// Errors about a state file, for errors.Is.
var (
	ErrNoState = errors.New("no state")
	ErrCorrupt = errors.New("damaged")
	ErrNewer   = errors.New("written by a newer version")
	ErrLocked  = errors.New("in use by another process")
	errStale   = errors.New("not loaded by this store")
	errMoved   = errors.New("it is not the directory that the agent has opened, which was moved, removed or mounted over")
)

// A StoreError names the file, the operation, the reason and the remedy.
type StoreError struct {
	Op     string // "read", "write", "open", "lock"
	Path   string
	Err    error
	Remedy string
}

// Error returns all fields in one line.
func (e *StoreError) Error() string {
	return fmt.Sprintf("state file %s: cannot %s: %v. Remedy: %s", e.Path, e.Op, e.Err, e.Remedy)
}

// Unwrap returns the reason.
func (e *StoreError) Unwrap() error { return e.Err }

// A Store keeps one State in a directory that it locks against other processes.
// It never replaces a file that it could not read.
type Store struct {
	dir  string
	root *os.Root
	lock *os.File

	mu     sync.Mutex
	loaded bool // Load has read the file, or found none
	stamp  string
	last   string        // what the stamp says of the state on disk, without the time; "" if it is not known to be the last one
	alive  time.Duration // when the agent was last alive, since the boot
	proven bool          // this run may say that it is alive, see Alive
}

// FreshFor is how long after the agent was last alive a state counts as fresh. Others must not take this node's
// space over before that (unless by force).
const FreshFor = 25 * time.Second

// aliveEvery is how often the time in the stamp is renewed.
const aliveEvery = 5 * time.Second

// OpenStore opens the state directory, creates it if necessary, and locks it. stamp
// is the path of a small file on a file system that a reboot empties (/run), or "":
// see [Store.Fresh].
func OpenStore(dir, stamp string) (*Store, error) {
	s := &Store{dir: dir, stamp: stamp}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, s.fail("open", "", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, s.fail("open", "", err)
	}
	s.root = root
	// Not for writing: a node with a state starts from a file system that is mounted read-only, too.
	if s.lock, err = root.OpenFile(lockFile, os.O_RDONLY|os.O_CREATE, 0o600); err != nil {
		root.Close()
		return nil, s.fail("open", lockFile, err)
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		s.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, s.fail("lock", lockFile, err)
	}
	return s, nil
}

// Close unlocks the directory. The state stays.
func (s *Store) Close() error {
	unlocked := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_UN) // closing does not while a child before its execve holds the file, too
	return errors.Join(unlocked, s.lock.Close(), s.root.Close())
}

// Path returns the state file's path.
func (s *Store) Path() string { return filepath.Join(s.dir, stateFile) }

// Load reads the state. It returns an error that wraps ErrNoState if there is no
// state file, and one that wraps ErrCorrupt or ErrNewer if the file must not be used.
// Load never changes the file. Save fails until Load has succeeded or found no
// file.
func (s *Store) Load() (*State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := s.root.Open(stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		s.loaded = true
		return nil, ErrNoState
	}
	if err != nil {
		return nil, s.fail("read", stateFile, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStateSize+1))
	if err != nil {
		return nil, s.fail("read", stateFile, err)
	}
	st, err := DecodeState(b)
	if err != nil {
		return nil, s.fail("read", stateFile, err)
	}
	s.loaded = true
	s.readStamp(st)
	return st, nil
}

// ReadState reads the state in a directory for whoever only looks at it: without a lock, beside an agent. Its errors are those of Load.
func ReadState(dir string) (*State, error) {
	path := filepath.Join(dir, stateFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoState
	}
	if err == nil {
		var st *State
		if st, err = DecodeState(b); err == nil {
			return st, nil
		}
	}
	return nil, (&Store{dir: dir}).fail("read", stateFile, err)
}

// Fresh reports whether the loaded state is proven to be the last one that was saved, and
// nobody else can have taken this node's space over since: the stamp file has the same
// generation, and the agent was alive not long ago. A restored backup or a rolled-back disk
// does not include the stamp. uptime is the time since the boot.
func (s *Store) Fresh(uptime time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven = s.last != "" && uptime >= s.alive && uptime-s.alive <= FreshFor
	return s.proven
}

// Alive notes that the agent takes part in gossip now, so that others would not take it for dead. It says so only of a state
// that was fresh or that this run has saved: one that was not fresh and is unconfirmed does not become fresh by a restart.
func (s *Store) Alive(uptime time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proven && uptime-s.alive >= aliveEvery {
		s.alive = uptime
		s.writeStamp()
	}
}

// Save replaces the state durably. If it fails, the old state is still there, or the
// new one if only the last sync failed.
func (s *Store) Save(st *State) error {
	b, err := EncodeState(st)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && !s.loaded {
		err = errStale
	}
	if err != nil {
		return s.fail("write", stateFile, err)
	}
	// The stamp is removed before the state is written, and written after it: a crash
	// in between leaves no stamp, never one that confirms an older state.
	s.dropStamp()
	if err := s.replace(b); err != nil {
		return err
	}
	s.last, s.proven = stampOf(st), true
	s.writeStamp()
	return nil
}

// Check reports why the next save would fail, or would be where the next start does not look: the directory is read-only, or it was
// moved or removed. It writes nothing.
func (s *Store) Check() error {
	opened, err := s.root.Stat(".")
	if err != nil {
		return s.fail("write", "", err)
	}
	if there, err := os.Stat(s.dir); err != nil || !os.SameFile(opened, there) {
		return s.fail("write", "", errMoved)
	}
	if err := syscall.Access(s.dir, 2); err != nil { // W_OK
		return s.fail("write", "", err)
	}
	return nil
}

func (s *Store) replace(b []byte) error {
	f, err := s.root.OpenFile(stateTemp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return s.fail("write", stateTemp, err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = s.root.Rename(stateTemp, stateFile)
	}
	if err != nil {
		s.root.Remove(stateTemp) // free the space; the state itself is unchanged
		return s.fail("write", stateTemp, err)
	}
	d, err := s.root.Open(".")
	if err != nil {
		return s.fail("write", stateFile, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return s.fail("write", stateFile, err)
	}
	return nil
}

// The stamp file: node ID, generation, and when the agent was last alive, in milliseconds since the boot.

func stampOf(st *State) string {
	id, _ := st.Node.MarshalText()
	return fmt.Sprintf("%s %d", id, st.Generation)
}

func (s *Store) readStamp(st *State) {
	if s.last = ""; s.stamp == "" {
		return
	}
	b, _ := os.ReadFile(s.stamp)
	text, ok := strings.CutPrefix(string(b), stampOf(st)+" ")
	if ms, err := strconv.ParseInt(strings.TrimSuffix(text, "\n"), 10, 63); ok && err == nil {
		s.last, s.alive = stampOf(st), time.Duration(ms)*time.Millisecond
	}
}

func (s *Store) dropStamp() {
	s.last, s.proven = "", false
	if s.stamp != "" {
		os.Remove(s.stamp)
	}
}

func (s *Store) writeStamp() {
	if s.stamp != "" { // without it the next start is not fresh; nothing else depends on it
		os.WriteFile(s.stamp, fmt.Appendf(nil, "%s %d\n", s.last, s.alive.Milliseconds()), 0o600)
	}
}

// fail wraps an error with the file and the remedy.
func (s *Store) fail(op, name string, err error) error {
	if _, ok := errors.AsType[*StoreError](err); ok {
		return err
	}
	path := filepath.Join(s.dir, name)
	remedy := "check the file and the disk; the agent never overwrites a file that it cannot read"
	switch {
	case errors.Is(err, ErrCorrupt):
		remedy = "restore the file from a backup; without one move it away and start again: the node joins as a new one, and `tulle forget` on another node takes over what it owned"
	case errors.Is(err, ErrNewer):
		remedy = "install the version of tulle that wrote it, or a later one"
	case errors.Is(err, ErrLocked):
		remedy = "another agent uses this directory: stop it, or give this one another --state-dir"
	case errors.Is(err, errStale):
		remedy = "the file there could not be read; see the error at start"
	case errors.Is(err, errMoved):
		remedy = fmt.Sprintf("put %s back: at the next start a node without its state joins as a new one", s.dir)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		remedy = fmt.Sprintf("free some space on the file system of %s; the state before is intact", s.dir)
	case errors.Is(err, syscall.EROFS):
		remedy = fmt.Sprintf("mount the file system of %[1]s writable, or give another --state-dir; if it is writable, the unit forbids it: make the directory, and let the service write there with ReadWritePaths=%[1]s (systemctl edit tulle)", s.dir)
	case errors.Is(err, fs.ErrPermission):
		remedy = fmt.Sprintf("run the agent as root, or make %s writable to its user", s.dir)
	case errors.Is(err, syscall.EIO):
		remedy = "the disk reports I/O errors: check it (dmesg) before anything else"
	}
	return &StoreError{Op: op, Path: path, Err: err, Remedy: remedy}
}

// EncodeState returns the file's bytes.
func EncodeState(st *State) ([]byte, error) {
	body, err := json.MarshalIndent(st.forFile(), "", " ")
	if err != nil {
		return nil, err
	}
	body = append(body, '\n')
	sum := sha256.Sum256(body)
	head := fmt.Sprintf("%s %d sha256:%s %d\n", stateMagic, stateVersion, hex.EncodeToString(sum[:]), len(body))
	return append([]byte(head), body...), nil
}

// DecodeState reads the file's bytes. Errors wrap ErrCorrupt or ErrNewer.
func DecodeState(b []byte) (*State, error) {
	corrupt := func(format string, args ...any) (*State, error) {
		return nil, fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
	}
	if len(b) > maxStateSize {
		return corrupt("larger than %d bytes", maxStateSize)
	}
	head, body, ok := bytes.Cut(b, []byte("\n"))
	if len(b) == 0 {
		return corrupt("the file is empty")
	}
	if !ok || len(head) > 128 {
		return corrupt("no header line")
	}
	f := strings.Split(string(head), " ")
	if f[0] != stateMagic || len(f) < 2 {
		return corrupt("does not begin with %q", stateMagic)
	}
	switch v, err := strconv.ParseUint(f[1], 10, 31); {
	case err != nil || v == 0:
		return corrupt("format version %q", f[1])
	case v > stateVersion:
		return nil, fmt.Errorf("%w: format %d, this program reads up to %d", ErrNewer, v, stateVersion)
	}
	if len(f) != 4 {
		return corrupt("header of %d fields", len(f))
	}
	if n, err := strconv.ParseUint(f[3], 10, 62); err != nil || n != uint64(len(body)) {
		return corrupt("%d bytes where the header says %s: truncated?", len(body), f[3])
	}
	if sum := sha256.Sum256(body); f[2] != "sha256:"+hex.EncodeToString(sum[:]) {
		return corrupt("the checksum does not match")
	}
	st := new(State)
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(st); err != nil {
		if lenient := json.Unmarshal(body, new(State)); lenient != nil {
			return corrupt("%v", lenient)
		}
		// Only unknown fields are wrong. Without them the next save would lose what they say.
		return nil, fmt.Errorf("%w: %v; the file is intact", ErrNewer, err)
	}
	if err := st.check(); err != nil {
		return corrupt("%v", err)
	}
	st.fromFile()
	return st, nil
}

// check returns an error if the state is not one that a correct program writes.
func (st *State) check() error {
	for _, f := range st.Families {
		if !f.CIDR.IsValid() || f.CIDR != f.CIDR.Masked() {
			return fmt.Errorf("cluster CIDR %v", f.CIDR)
		}
	}
	for _, list := range []([]string){prefixFaults(st), addrFaults(st)} {
		if len(list) > 0 {
			return errors.New(list[0])
		}
	}
	return nil
}

func prefixFaults(st *State) (out []string) {
	for i, p := range st.Blocks {
		if !p.IsValid() || p != p.Masked() || Overlaps(st.Blocks[:i], p) {
			out = append(out, fmt.Sprintf("block %v", p))
		}
	}
	return out
}

func addrFaults(st *State) (out []string) {
	for _, a := range st.Allocations {
		if !a.Addr.IsValid() || a.Key == "" {
			out = append(out, fmt.Sprintf("allocation of %v to %q", a.Addr, a.Key))
		}
	}
	for _, c := range st.Cooling {
		if !c.Addr.IsValid() {
			out = append(out, "cool-down of no address")
		}
	}
	return out
}
