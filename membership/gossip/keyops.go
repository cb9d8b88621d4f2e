package gossip

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/keyring"
)

// Key operations go to every live member as messages, and every member answers.
// A request: ID (8), operation (1), then for install the key, for use and remove
// the fingerprint. An answer: ID (8), status (1, 0 is success); then on failure
// the reason as text, on success seconds since the primary changed (4), count
// (1) and the fingerprints, the primary first.
type keyOp byte

const (
	keyList keyOp = iota + 1
	keyInstall
	keyUse
	keyRemove
	keyOpEnd
)

func (op keyOp) String() string { return [...]string{"?", "list", "install", "use", "remove"}[op] }

const (
	keyRequestHead = 8 + 1
	maxKeyReason   = 512     // bytes
	maxKeyAge      = 1 << 31 // seconds: longer ago is as long ago
)

type keyRequest struct {
	id  uint64
	op  keyOp
	key []byte              // install
	fp  keyring.Fingerprint // use, remove
}

func (r keyRequest) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, r.id)
	b = append(b, byte(r.op))
	switch r.op {
	case keyInstall:
		b = append(b, r.key...)
	case keyUse, keyRemove:
		b = append(b, r.fp[:]...)
	}
	return b
}

func decodeKeyRequest(b []byte) (keyRequest, error) {
	if len(b) < keyRequestHead {
		return keyRequest{}, errors.New("key request is cut short")
	}
	r := keyRequest{id: binary.BigEndian.Uint64(b), op: keyOp(b[8])}
	b = b[keyRequestHead:]
	want := 0
	switch r.op {
	case keyList:
	case keyInstall:
		want = keyring.Size
	case keyUse, keyRemove:
		want = len(r.fp)
	default:
		return keyRequest{}, fmt.Errorf("key request of unknown operation %d", r.op)
	}
	if len(b) != want {
		return keyRequest{}, fmt.Errorf("key request %v with %d bytes, wants %d", r.op, len(b), want)
	}
	if r.op == keyInstall {
		r.key = slices.Clone(b)
	} else if want > 0 {
		r.fp = keyring.Fingerprint(b)
	}
	return r, nil
}

type keyAnswer struct {
	id     uint64
	reason string        // of a failure; "" is success
	age    time.Duration // since the primary changed, whole seconds
	keys   []keyring.Fingerprint
}

func (a keyAnswer) encode() []byte {
	b := binary.BigEndian.AppendUint64(nil, a.id)
	if a.reason != "" {
		return append(append(b, 1), a.reason[:min(len(a.reason), maxKeyReason)]...)
	}
	b = append(b, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(min(a.age/time.Second, maxKeyAge)))
	b = append(b, byte(len(a.keys)))
	for _, fp := range a.keys {
		b = append(b, fp[:]...)
	}
	return b
}

func decodeKeyAnswer(b []byte) (keyAnswer, error) {
	if len(b) < keyRequestHead {
		return keyAnswer{}, errors.New("key answer is cut short")
	}
	a := keyAnswer{id: binary.BigEndian.Uint64(b)}
	status, b := b[8], b[keyRequestHead:]
	if status != 0 {
		if len(b) == 0 || len(b) > maxKeyReason {
			return keyAnswer{}, fmt.Errorf("key answer with a reason of %d bytes", len(b))
		}
		a.reason = strings.ToValidUTF8(string(b), "?")
		return a, nil
	}
	if len(b) < 5 || int(b[4]) > keyring.MaxKeys || len(b) != 5+int(b[4])*sha256.Size {
		return keyAnswer{}, fmt.Errorf("key answer of %d bytes", len(b))
	}
	a.age = time.Duration(min(binary.BigEndian.Uint32(b), maxKeyAge)) * time.Second
	for fp := range slices.Chunk(b[5:], sha256.Size) {
		a.keys = append(a.keys, keyring.Fingerprint(fp))
	}
	return a, nil
}

// A KeyAnswer is the answer of one member to a key operation.
type KeyAnswer struct {
	ID   membership.NodeID
	Name string
	Err  string // "" : done
	Keys []keyring.Info
	age  time.Duration
}

// A KeyReport has the answers of all live members, this node's first. Others were not
// asked, and need a new key before they can return. Gossip does not know all of them:
// some died before this node started.
type KeyReport struct {
	Answers []KeyAnswer
}

// Err returns nil if every live member confirmed.
func (r KeyReport) Err() error {
	var failed []string
	for _, a := range r.Answers {
		if a.Err != "" {
			failed = append(failed, a.Name+": "+a.Err)
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return fmt.Errorf("not confirmed by %d of %d members: %s", len(failed), len(r.Answers), strings.Join(failed, "; "))
}

// ErrNoKeyring is returned by key operations if gossip is not encrypted.
var ErrNoKeyring = errors.New("gossip runs without a key: put one into a file and start every agent with --gossip-key-file")

// KeyList asks every live member for its keys.
func (g *Gossip) KeyList(ctx context.Context) (KeyReport, error) {
	return g.keyOperation(ctx, keyRequest{op: keyList})
}

// KeyInstall installs a key on every live member, for decryption only.
func (g *Gossip) KeyInstall(ctx context.Context, key []byte) (KeyReport, error) {
	if len(key) != keyring.Size {
		return KeyReport{}, fmt.Errorf("gossip key has %d bytes, AES-256 needs %d", len(key), keyring.Size)
	}
	return g.keyOperation(ctx, keyRequest{op: keyInstall, key: key})
}

// KeyUse makes an installed key the primary of every live member. It changes nothing
// unless all of them confirm that they have it, so that all members can decrypt messages
// of those that switch first.
func (g *Gossip) KeyUse(ctx context.Context, fp keyring.Fingerprint) (KeyReport, error) {
	before, err := g.KeyList(ctx)
	if err == nil {
		err = before.Err()
	}
	if err != nil {
		return before, fmt.Errorf("keys use: nothing was changed: %w", err)
	}
	var lack []string
	for _, a := range before.Answers {
		if !slices.ContainsFunc(a.Keys, func(k keyring.Info) bool { return k.Fingerprint == fp }) {
			lack = append(lack, a.Name)
		}
	}
	if len(lack) > 0 {
		return before, fmt.Errorf("keys use: nothing was changed: key %v is not installed on %s (`tulle keys install`)", fp, strings.Join(lack, ", "))
	}
	return g.keyOperation(ctx, keyRequest{op: keyUse, fp: fp})
}

// KeyRemove removes a key from every live member. It changes nothing while one of them
// encrypts with it, and waits until messages encrypted with it have arrived.
func (g *Gossip) KeyRemove(ctx context.Context, fp keyring.Fingerprint) (KeyReport, error) {
	before, err := g.KeyList(ctx)
	if err == nil {
		err = before.Err()
	}
	if err != nil {
		return before, fmt.Errorf("keys remove: nothing was changed: %w", err)
	}
	youngest := g.cfg.pace.keySettle
	for _, a := range before.Answers {
		if len(a.Keys) > 0 && a.Keys[0].Fingerprint == fp {
			return before, fmt.Errorf("keys remove: nothing was changed: key %v is the primary of %s (`tulle keys use` another one first)", fp, a.Name)
		}
		youngest = min(youngest, a.age)
	}
	if wait := g.cfg.pace.keySettle - youngest; wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return before, fmt.Errorf("keys remove: nothing was changed: %w", ctx.Err())
		}
	}
	return g.keyOperation(ctx, keyRequest{op: keyRemove, fp: fp})
}

// FindKey returns the fingerprint of the key that s denotes: a base64 key, or a prefix of the fingerprint of a key that this node
// has, or else another living member. So a removal can be repeated that did not reach all.
func (g *Gossip) FindKey(ctx context.Context, s string) (keyring.Fingerprint, error) {
	if g.cfg.Keyring == nil {
		return keyring.Fingerprint{}, ErrNoKeyring
	}
	if key, err := keyring.Parse(s); err == nil {
		return keyring.FingerprintOf(key), nil
	}
	found := matching(s, g.cfg.Keyring.Keys())
	if len(found) == 0 {
		r, err := g.KeyList(ctx)
		if err != nil {
			return keyring.Fingerprint{}, err
		}
		for _, a := range r.Answers {
			found = append(found, matching(s, a.Keys)...)
		}
		slices.SortFunc(found, func(a, b keyring.Fingerprint) int { return bytes.Compare(a[:], b[:]) })
		found = slices.Compact(found)
	}
	if len(found) != 1 {
		return keyring.Fingerprint{}, fmt.Errorf("%d installed keys begin with %.20q: see `tulle keys list`", len(found), s)
	}
	return found[0], nil
}

// matching returns the fingerprints that begin with s.
func matching(s string, keys []keyring.Info) (found []keyring.Fingerprint) {
	for _, k := range keys {
		if len(s) >= 4 && strings.HasPrefix(hex.EncodeToString(k.Fingerprint[:]), strings.ToLower(s)) {
			found = append(found, k.Fingerprint)
		}
	}
	return found
}

// keyOperation asks all members in parallel and collects the answers.
func (g *Gossip) keyOperation(ctx context.Context, r keyRequest) (KeyReport, error) {
	if g.cfg.Keyring == nil {
		return KeyReport{}, ErrNoKeyring
	}
	if _, err := g.current(); err != nil {
		return KeyReport{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.pace.keyTimeout)
	defer cancel()
	var id [8]byte
	rand.Read(id[:])
	r.id = binary.BigEndian.Uint64(id[:])

	var report KeyReport
	var ask []Member
	for _, m := range g.Members() {
		if m.State <= StateSuspect {
			ask = append(ask, m)
		}
	}
	answers := g.keys.expect(r.id, len(ask))
	defer g.keys.forget(r.id)

	got := make([]*KeyAnswer, len(ask))
	sendErr := make([]error, len(ask))
	index := map[membership.NodeID]int{}
	for i, m := range ask {
		index[m.ID] = i
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, parallelJoins)
	body := r.encode()
	wg.Go(func() {
		for i, m := range ask {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				if sendErr[i] = g.sendEnvelope(ctx, m.ID, envelope{kind: kindKeyRequest, body: body}); sendErr[i] != nil {
					answers <- keyAnswered{m.ID, keyAnswer{id: r.id, reason: sendErr[i].Error()}}
				}
			})
		}
	})
	own := g.applyKey(r)
	report.Answers = append(report.Answers, KeyAnswer{ID: g.cfg.ID, Name: g.cfg.Name, Err: own.reason, Keys: keyInfos(own.keys), age: own.age})
	for left := len(ask); left > 0; {
		select {
		case a := <-answers:
			i, asked := index[a.from]
			if !asked || got[i] != nil {
				continue
			}
			got[i] = &KeyAnswer{Err: a.reason, Keys: keyInfos(a.keys), age: a.age}
			left--
		case <-ctx.Done():
			left = 0
		}
	}
	wg.Wait()
	for i, m := range ask {
		a := KeyAnswer{Err: "no answer"}
		if got[i] != nil {
			a = *got[i]
		}
		a.ID, a.Name = m.ID, m.Name
		report.Answers = append(report.Answers, a)
	}
	return report, nil
}

func keyInfos(fps []keyring.Fingerprint) []keyring.Info {
	var list []keyring.Info
	for i, fp := range fps {
		list = append(list, keyring.Info{Fingerprint: fp, Primary: i == 0})
	}
	return list
}

// applyKey executes one operation on this node's keyring.
func (g *Gossip) applyKey(r keyRequest) keyAnswer {
	a := keyAnswer{id: r.id}
	ring := g.cfg.Keyring
	if ring == nil {
		a.reason = ErrNoKeyring.Error()
		return a
	}
	var err error
	switch r.op {
	case keyInstall:
		err = ring.Install(r.key)
	case keyUse:
		err = ring.Use(r.fp)
	case keyRemove:
		err = ring.Remove(r.fp)
	}
	if err != nil {
		a.reason = err.Error()
		return a
	}
	if r.op != keyList {
		g.log.Info("gossip: keyring changed", "operation", r.op.String())
	}
	for _, k := range ring.Keys() {
		a.keys = append(a.keys, k.Fingerprint)
	}
	a.age = ring.PrimaryAge()
	return a
}

// answerKeys serves the requests of other members, one after the other.
func (g *Gossip) answerKeys(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-g.keyReqs:
			r, err := decodeKeyRequest(e.body)
			if err != nil {
				g.count.malformed.Add(1)
				continue
			}
			a := g.applyKey(r)
			sctx, cancel := context.WithTimeout(ctx, g.cfg.pace.keyTimeout)
			if err := g.sendEnvelope(sctx, e.from, envelope{kind: kindKeyAnswer, body: a.encode()}); err != nil {
				g.log.Warn("gossip: key operation done, but its answer is lost", "err", err)
			}
			cancel()
		}
	}
}

// keyWaiters routes answers to the operations that wait for them.
type keyWaiters struct {
	mu sync.Mutex
	by map[uint64]chan keyAnswered
}

type keyAnswered struct {
	from membership.NodeID
	keyAnswer
}

// expect opens a place for n members, each of which may cause an answer and a
// send error.
func (w *keyWaiters) expect(id uint64, n int) chan keyAnswered {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.by == nil {
		w.by = map[uint64]chan keyAnswered{}
	}
	ch := make(chan keyAnswered, 2*n+1)
	w.by[id] = ch
	return ch
}

func (w *keyWaiters) forget(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.by, id)
}

func (g *Gossip) keyAnswer(e envelope) {
	a, err := decodeKeyAnswer(e.body)
	if err != nil {
		g.count.malformed.Add(1)
		return
	}
	g.keys.mu.Lock()
	ch := g.keys.by[a.id]
	g.keys.mu.Unlock()
	select {
	case ch <- keyAnswered{e.from, a}: // never ready for a nil channel
	default:
	}
}
