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
)

// The state file: one line of header, then JSON.
//
//	tulle-state VERSION sha256:HEX LENGTH\n
//	{ … }\n
//
// VERSION is the format's; HEX is the SHA-256 of the LENGTH bytes that follow and
// end the file. It is replaced as a whole: written beside, synced, renamed over,
// and the directory synced, so that after a crash it is the old or the new state,
// never a part.
const (
	stateFile    = "state"
	stateTemp    = "state.tmp"
	lockFile     = "lock"
	stateMagic   = "tulle-state"
	stateVersion = 1
	// maxStateSize bounds what Load reads, in bytes: 65,536 table entries and
	// as many allocations fit several times.
	maxStateSize = 256 << 20
)

// What is wrong with a state file, for errors.Is.
var (
	ErrNoState = errors.New("no state")
	ErrCorrupt = errors.New("damaged")
	ErrNewer   = errors.New("written by a newer version")
	ErrLocked  = errors.New("in use by another process")
	errStale   = errors.New("not loaded by this store")
)

// A StoreError names the file, what was tried, why it failed and the way out.
type StoreError struct {
	Op     string // "read", "write", "open", "lock"
	Path   string
	Err    error
	Remedy string
}

// Error returns one line with everything in it.
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

	mu      sync.Mutex
	loaded  bool // Load has seen that the file is ours, or not there
	witness string
	fresh   bool
}

// OpenStore opens, and if need be makes, the state directory, and locks it.
// witness is the path of a small file on a file system that does not survive a
// reboot (/run), or "": see [Store.Fresh].
func OpenStore(dir, witness string) (*Store, error) {
	s := &Store{dir: dir, witness: witness}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, s.fail("open", "", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, s.fail("open", "", err)
	}
	s.root = root
	if s.lock, err = root.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
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
	return errors.Join(s.lock.Close(), s.root.Close())
}

// Path returns the state file's path.
func (s *Store) Path() string { return filepath.Join(s.dir, stateFile) }

// Load reads the state. It returns an error that wraps ErrNoState when there is
// none, and one that wraps ErrCorrupt or ErrNewer when there is one that it must
// not use; the file stays as it is, and Save refuses until Load succeeds or finds
// no file.
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
	s.fresh = s.witness != "" && s.readWitness() == witnessOf(st)
	return st, nil
}

// Fresh reports whether the loaded state is proven to be the last that was saved
// here: the witness, which a restored backup or a rolled back disk does not take
// along, names the same generation.
func (s *Store) Fresh() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fresh
}

// Save replaces the state durably. When it fails the old state is still there, or,
// when only the last sync failed, the new one.
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
	// The witness goes before the state and comes back after it: a crash in
	// between leaves none, never one that vouches for an older state.
	s.dropWitness()
	if err := s.replace(b); err != nil {
		return err
	}
	s.writeWitness(st)
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
		s.root.Remove(stateTemp) // give the space back; the state itself is untouched
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

func witnessOf(st *State) string {
	id, _ := st.Node.MarshalText()
	return fmt.Sprintf("%s %d\n", id, st.Generation)
}

func (s *Store) readWitness() string {
	b, _ := os.ReadFile(s.witness)
	return string(b)
}

func (s *Store) dropWitness() {
	if s.witness != "" {
		os.Remove(s.witness)
	}
}

func (s *Store) writeWitness(st *State) {
	if s.witness != "" { // without it the next start is not fresh, that is all
		os.WriteFile(s.witness, []byte(witnessOf(st)), 0o600)
	}
}

// fail wraps an error with the file and what an operator can do about it.
func (s *Store) fail(op, name string, err error) error {
	if _, ok := errors.AsType[*StoreError](err); ok {
		return err
	}
	path := filepath.Join(s.dir, name)
	remedy := "look at the file and the disk; the agent overwrites nothing that it cannot read"
	switch {
	case errors.Is(err, ErrCorrupt):
		remedy = "restore the file from a backup; without one move it away and start again: the node joins as a new one, and `tulle forget` on another node takes over what it owned"
	case errors.Is(err, ErrNewer):
		remedy = "install the version of tulle that wrote it, or a later one"
	case errors.Is(err, ErrLocked):
		remedy = "another agent uses this directory: stop it, or give this one another --state-dir"
	case errors.Is(err, errStale):
		remedy = "the file there could not be read; see the error at start"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		remedy = fmt.Sprintf("free some space on the file system of %s; the state before is intact", s.dir)
	case errors.Is(err, syscall.EROFS):
		remedy = fmt.Sprintf("mount the file system of %s writable, or give another --state-dir", s.dir)
	case errors.Is(err, fs.ErrPermission):
		remedy = fmt.Sprintf("run the agent as root, or make %s writable to its user", s.dir)
	case errors.Is(err, syscall.EIO):
		remedy = "the disk reports I/O errors: check it (dmesg) before anything else"
	}
	return &StoreError{Op: op, Path: path, Err: err, Remedy: remedy}
}

// EncodeState returns the file's bytes.
func EncodeState(st *State) ([]byte, error) {
	body, err := json.MarshalIndent(st, "", " ")
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
		return corrupt("%v", err)
	}
	if err := st.check(); err != nil {
		return corrupt("%v", err)
	}
	return st, nil
}

// check refuses what no correct program wrote.
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
