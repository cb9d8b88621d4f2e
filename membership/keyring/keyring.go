package keyring

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Size is the length of a gossip key in bytes: AES-256, base64 on disk.
const Size = 32

// Limits of a keyring.
const (
	MaxKeys = 16
	maxFile = 64 << 10 // bytes
)

// A Fingerprint identifies a key without revealing it: the SHA-256 of its bytes.
type Fingerprint [sha256.Size]byte

// String returns the first 16 hexadecimal digits, the ID of the key in `tulle keys`.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:8]) }

// MarshalText writes the fingerprint as String does.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// A Ring is the ordered set of gossip keys of one node: the first one, the
// primary, encrypts; all of them decrypt. It is safe for concurrent use. Every
// change is on disk before it takes effect.
type Ring struct {
	mu   sync.Mutex
	path string // "": in memory only
	keys [][]byte
	live Live      // memberlist's ring, once attached
	used time.Time // when the primary changed; zero: not in this run
}

// Live is the keyring of the running gossip, which is updated with every change. memberlist.Keyring implements it.
type Live interface {
	AddKey([]byte) error
	UseKey([]byte) error
	RemoveKey([]byte) error
}

// Generate returns a new random key as a line for a keyring file.
func Generate() string {
	var key [Size]byte
	rand.Read(key[:])
	return base64.StdEncoding.EncodeToString(key[:])
}

// whence is where a key comes from. A member with a new key would be alone.
const whence = "copy the file from another node, or make the first key of a cluster with `tulle keys generate`"

// Parse parses one base64 key.
func Parse(s string) ([]byte, error) {
	key, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(s))
	if err != nil {
		return nil, fmt.Errorf("gossip key is not base64: %s", whence)
	}
	if len(key) != Size {
		return nil, fmt.Errorf("gossip key has %d bytes, AES-256 needs %d: %s", len(key), Size, whence)
	}
	return key, nil
}

// FingerprintOf returns the fingerprint of a key.
func FingerprintOf(key []byte) Fingerprint { return sha256.Sum256(key) }

// New returns a keyring in memory. The first key is the primary.
func New(keys ...[]byte) (*Ring, error) {
	k := &Ring{}
	for _, key := range keys {
		if len(key) != Size {
			return nil, fmt.Errorf("gossip key has %d bytes, AES-256 needs %d", len(key), Size)
		}
		k.keys = append(k.keys, bytes.Clone(key))
	}
	if len(k.keys) == 0 {
		return nil, errors.New("keyring is empty, it needs one base64 key per line: " + whence)
	}
	if len(k.keys) > MaxKeys {
		return nil, fmt.Errorf("keyring with %d keys, the limit is %d", len(k.keys), MaxKeys)
	}
	return k, nil
}

// Load reads a keyring file: one base64 key per line; the first one is the primary. Empty
// lines and lines that begin with # are ignored. Only the owner may have access to the
// file.
func Load(path string) (*Ring, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("gossip key file %s does not exist: copy it from another node, or make the first one with `tulle keys generate > %s; chmod 600 %s`", path, path, path)
	}
	if err != nil {
		return nil, fmt.Errorf("gossip key file: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("gossip key file: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("gossip key file %s is not a regular file", path)
	}
	if perm := st.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("gossip key file %s has mode %#o, others than its owner can read or change it: chmod 600 %s", path, perm, path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("gossip key file: %w", err)
	}
	keys, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("gossip key file %s: %w", path, err)
	}
	k, err := New(keys...)
	if err != nil {
		return nil, fmt.Errorf("gossip key file %s: %w", path, err)
	}
	k.path = path
	return k, nil
}

// parse parses a keyring file. Duplicate keys count once.
func parse(text []byte) ([][]byte, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("is larger than %d bytes", maxFile)
	}
	var keys [][]byte
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		key, err := Parse(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if index(keys, FingerprintOf(key)) < 0 {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// Info describes one key of a ring.
type Info struct {
	Fingerprint Fingerprint
	Primary     bool
}

// Keys returns the ring's keys, the primary first.
func (k *Ring) Keys() []Info {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := make([]Info, len(k.keys))
	for i, key := range k.keys {
		list[i] = Info{FingerprintOf(key), i == 0}
	}
	return list
}

func index(keys [][]byte, fp Fingerprint) int {
	return slices.IndexFunc(keys, func(key []byte) bool { return FingerprintOf(key) == fp })
}

// Install adds a key that decrypts but does not encrypt yet.
func (k *Ring) Install(key []byte) error {
	if len(key) != Size {
		return fmt.Errorf("gossip key has %d bytes, AES-256 needs %d", len(key), Size)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if index(k.keys, FingerprintOf(key)) >= 0 {
		return nil
	}
	if len(k.keys) >= MaxKeys {
		return fmt.Errorf("keyring is full with %d keys: remove an old one first (`tulle keys remove`)", MaxKeys)
	}
	next := append(slices.Clone(k.keys), bytes.Clone(key))
	if err := k.save(next); err != nil {
		return err
	}
	k.keys = next
	if k.live != nil {
		return k.live.AddKey(next[len(next)-1])
	}
	return nil
}

// Use makes an installed key the primary.
func (k *Ring) Use(fp Fingerprint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := index(k.keys, fp)
	switch {
	case i < 0:
		return fmt.Errorf("key %v is not installed (`tulle keys install`)", fp)
	case i == 0:
		return nil
	}
	key := k.keys[i]
	next := append([][]byte{key}, slices.Delete(slices.Clone(k.keys), i, i+1)...)
	if err := k.save(next); err != nil {
		return err
	}
	k.keys, k.used = next, time.Now()
	if k.live != nil {
		return k.live.UseKey(key)
	}
	return nil
}

// PrimaryAge returns how long the current key has been the primary.
func (k *Ring) PrimaryAge() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.used.IsZero() {
		return time.Hour
	}
	return time.Since(k.used)
}

// Remove removes a key that is not the primary. A missing key is not an error.
func (k *Ring) Remove(fp Fingerprint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := index(k.keys, fp)
	switch {
	case i < 0:
		return nil
	case i == 0:
		return fmt.Errorf("key %v is the primary: use another one first (`tulle keys use`)", fp)
	}
	gone, next := k.keys[i], slices.Delete(slices.Clone(k.keys), i, i+1)
	if err := k.save(next); err != nil {
		return err
	}
	last := i == len(k.keys)-1
	k.keys = next
	if k.live == nil {
		return nil
	}
	// memberlist's RemoveKey moves the keys after the removed one within an array
	// that its readers use without a lock. That is safe only for the last key. So
	// move the key to the end first: make every other key the primary for a moment
	// (all members have them), the real primary last. The order is then that of this
	// keyring again.
	if !last {
		for _, key := range slices.Backward(next) {
			if err := k.live.UseKey(key); err != nil {
				return err
			}
		}
	}
	return k.live.RemoveKey(gone)
}

// Attach creates the live ring with build from the present keys, and updates it with every
// change.
func (k *Ring) Attach(build func(keys [][]byte, primary []byte) (Live, error)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	live, err := build(slices.Clone(k.keys), k.keys[0])
	if err != nil {
		return err
	}
	k.live = live
	return nil
}

// Copy returns the keys as they are now, and which of them is the primary.
func (k *Ring) Copy() (keys [][]byte, primary []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return slices.Clone(k.keys), k.keys[0]
}

// save writes a temporary file and renames it, so that a crash leaves either the old or the
// new file.
func (k *Ring) save(keys [][]byte) error {
	if k.path == "" {
		return nil
	}
	// Keep a symbolic link: replace its target.
	path, err := filepath.EvalSymlinks(k.path)
	if err != nil {
		return k.unwritten(err)
	}
	var text bytes.Buffer
	text.WriteString("# Tulle gossip keys, AES-256, one per line. The first one encrypts, all decrypt.\n")
	for _, key := range keys {
		fmt.Fprintln(&text, base64.StdEncoding.EncodeToString(key))
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return k.unwritten(err)
	}
	defer os.Remove(tmp.Name()) // fails, and should, once renamed
	_, err = tmp.Write(text.Bytes())
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return k.unwritten(err)
	}
	return nil
}

// unwritten says that the file could not be changed, and what to do where the reason does not say that.
func (k *Ring) unwritten(err error) error {
	remedy := ""
	if errors.Is(err, syscall.EROFS) {
		remedy = fmt.Sprintf("; if its file system is writable, the unit forbids it: let the service write there with ReadWritePaths=%s (systemctl edit tulle)", filepath.Dir(k.path))
	}
	return fmt.Errorf("gossip key file %s cannot be rewritten, keys are unchanged: %w%s", k.path, err, remedy)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
