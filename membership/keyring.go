package membership

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
	"time"
)

// KeySize is the length of a gossip key in bytes: AES-256, base64 on disk.
const KeySize = 32

// Limits of a keyring.
const (
	maxKeys        = 16
	maxKeyringFile = 64 << 10 // bytes
)

// A Fingerprint names a key without telling it: the SHA-256 of its bytes.
type Fingerprint [sha256.Size]byte

// String returns the first 16 hexadecimal digits, which is what people and
// `tulle keys` use.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:8]) }

// MarshalText writes the fingerprint as String does.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// A Keyring is the ordered set of gossip keys of one node: the first one, the
// primary, encrypts; all of them decrypt. It is safe for concurrent use. Every
// change is on disk before it takes effect.
type Keyring struct {
	mu   sync.Mutex
	path string // "": in memory only
	keys [][]byte
	live liveRing  // memberlist's ring, once attached
	used time.Time // when the primary changed; zero: not in this run
}

// liveRing is the part of memberlist.Keyring that is used here.
type liveRing interface {
	AddKey([]byte) error
	UseKey([]byte) error
	RemoveKey([]byte) error
}

// GenerateKey returns a new random key as a line of a keyring file.
func GenerateKey() string {
	var key [KeySize]byte
	rand.Read(key[:])
	return base64.StdEncoding.EncodeToString(key[:])
}

// ParseKey reads one base64 key.
func ParseKey(s string) ([]byte, error) {
	key, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(s))
	if err != nil {
		return nil, fmt.Errorf("gossip key is not base64: make one with `tulle keys generate`")
	}
	if len(key) != KeySize {
		return nil, fmt.Errorf("gossip key has %d bytes, AES-256 needs %d: make one with `tulle keys generate`", len(key), KeySize)
	}
	return key, nil
}

// KeyFingerprint returns the name of a key.
func KeyFingerprint(key []byte) Fingerprint { return sha256.Sum256(key) }

// NewKeyring returns a keyring in memory. The first key is the primary.
func NewKeyring(keys ...[]byte) (*Keyring, error) {
	k := &Keyring{}
	for _, key := range keys {
		if len(key) != KeySize {
			return nil, fmt.Errorf("gossip key has %d bytes, AES-256 needs %d", len(key), KeySize)
		}
		k.keys = append(k.keys, bytes.Clone(key))
	}
	if len(k.keys) == 0 {
		return nil, errors.New("keyring is empty: it needs one base64 key per line (`tulle keys generate`)")
	}
	if len(k.keys) > maxKeys {
		return nil, fmt.Errorf("keyring with %d keys, the limit is %d", len(k.keys), maxKeys)
	}
	return k, nil
}

// LoadKeyring reads a keyring file: one base64 key per line, the first one the
// primary; empty lines and lines that begin with # are passed over. The file
// must be readable by its owner alone.
func LoadKeyring(path string) (*Keyring, error) {
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
	text, err := io.ReadAll(io.LimitReader(f, maxKeyringFile+1))
	if err != nil {
		return nil, fmt.Errorf("gossip key file: %w", err)
	}
	keys, err := parseKeyring(text)
	if err != nil {
		return nil, fmt.Errorf("gossip key file %s: %w", path, err)
	}
	k, err := NewKeyring(keys...)
	if err != nil {
		return nil, fmt.Errorf("gossip key file %s: %w", path, err)
	}
	k.path = path
	return k, nil
}

// parseKeyring reads the text of a keyring file. Repeated keys count once.
func parseKeyring(text []byte) ([][]byte, error) {
	if len(text) > maxKeyringFile {
		return nil, fmt.Errorf("is larger than %d bytes", maxKeyringFile)
	}
	var keys [][]byte
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		key, err := ParseKey(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if indexKey(keys, KeyFingerprint(key)) < 0 {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// KeyInfo describes one key of a ring.
type KeyInfo struct {
	Fingerprint Fingerprint
	Primary     bool
}

// Keys returns the ring's keys, the primary first.
func (k *Keyring) Keys() []KeyInfo {
	k.mu.Lock()
	defer k.mu.Unlock()
	list := make([]KeyInfo, len(k.keys))
	for i, key := range k.keys {
		list[i] = KeyInfo{KeyFingerprint(key), i == 0}
	}
	return list
}

func indexKey(keys [][]byte, fp Fingerprint) int {
	return slices.IndexFunc(keys, func(key []byte) bool { return KeyFingerprint(key) == fp })
}

// install adds a key that decrypts but does not encrypt yet.
func (k *Keyring) install(key []byte) error {
	if len(key) != KeySize {
		return fmt.Errorf("gossip key has %d bytes, AES-256 needs %d", len(key), KeySize)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if indexKey(k.keys, KeyFingerprint(key)) >= 0 {
		return nil
	}
	if len(k.keys) >= maxKeys {
		return fmt.Errorf("keyring is full with %d keys: remove an old one first (`tulle keys remove`)", maxKeys)
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

// use makes an installed key the primary.
func (k *Keyring) use(fp Fingerprint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := indexKey(k.keys, fp)
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

// primaryAge returns for how long the primary has been the primary.
func (k *Keyring) primaryAge() time.Duration {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.used.IsZero() {
		return time.Hour
	}
	return time.Since(k.used)
}

// remove drops a key that is not the primary. A key that is not there counts as
// removed.
func (k *Keyring) remove(fp Fingerprint) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := indexKey(k.keys, fp)
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
	// memberlist's RemoveKey moves the keys behind the removed one within the
	// array that its readers hold without a lock. It is harmless for the last
	// key only, so bring the key there: make every other one the primary for an
	// instant (the members have them all), the real one last. The order is then
	// this keyring's again.
	if !last {
		for _, key := range slices.Backward(next) {
			if err := k.live.UseKey(key); err != nil {
				return err
			}
		}
	}
	return k.live.RemoveKey(gone)
}

// attach hands the keys to memberlist's ring and keeps it up to date. make
// builds that ring out of the present keys.
func (k *Keyring) attach(build func(keys [][]byte, primary []byte) (liveRing, error)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	live, err := build(slices.Clone(k.keys), k.keys[0])
	if err != nil {
		return err
	}
	k.live = live
	return nil
}

// save writes the file beside the old one and renames it, so that a crash
// leaves one or the other.
func (k *Keyring) save(keys [][]byte) error {
	if k.path == "" {
		return nil
	}
	// A symbolic link keeps pointing where it did.
	path, err := filepath.EvalSymlinks(k.path)
	if err != nil {
		return fmt.Errorf("gossip key file %s cannot be rewritten, keys are unchanged: %w", k.path, err)
	}
	var text bytes.Buffer
	text.WriteString("# Tulle gossip keys, AES-256, one per line. The first one encrypts, all decrypt.\n")
	for _, key := range keys {
		fmt.Fprintln(&text, base64.StdEncoding.EncodeToString(key))
	}
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("gossip key file %s cannot be rewritten, keys are unchanged: %w", k.path, err)
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
		return fmt.Errorf("gossip key file %s cannot be rewritten, keys are unchanged: %w", k.path, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
