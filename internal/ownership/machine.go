package ownership

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// Errors for errors.Is. Returned errors wrap them with details.
var (
	ErrNotReady     = errors.New("this node has no pod addresses to give yet")
	ErrUnconfirmed  = errors.New("the table of this node is not confirmed")
	ErrGrowing      = errors.New("the open blocks are full, more space is requested: try again in a moment")
	ErrExhausted    = errors.New("the cluster's address space is exhausted")
	ErrOtherCluster = errors.New("the other side belongs to another cluster")
	ErrPodsAlive    = errors.New("pods still have addresses")
	ErrAlive        = errors.New("the node is alive")
	ErrNoMajority   = errors.New("this node does not see a majority of the members")
	ErrBusy         = errors.New("another operation is running")
	ErrRefused      = errors.New("refused")
	ErrTimeout      = errors.New("no answer in time")
)

// A Machine is the address-space state machine of one node. Create it with New and pass
// it messages and time.
type Machine struct {
	cfg  Config
	env  Env
	rand *rand.Rand
	log  *slog.Logger

	mu    sync.Mutex
	phase Phase
	since time.Time
	why   string

	cluster    ClusterID
	params     Params
	table      *membership.Table
	pool       *ipam.Pool
	joined     bool
	left       bool
	generation uint64
	granted    map[NodeID]uint64
	promises   map[NodeID]promise
	peers      map[NodeID]ipam.Peer
	seen       map[NodeID]time.Time // when nodes were last seen alive in this run, lately
	departed   map[NodeID]bool      // nodes that have left by their own word; such an ID never returns
	former     []NodeID             // nodes that left or were forgotten, and have not been seen since; oldest first
	toldFormer int                  // how many of them were told of, see departures

	confirm  confirmation
	asks     [2]ask // by family index: 0 IPv4, 1 IPv6
	lastSeq  uint64
	leave    *leaving
	forget   *forgetting
	found    founding
	heldNext time.Time
	started  time.Time

	completeFrom   time.Time // since when all seeds, completeOthers of them, have answered; zero: not looked at yet
	completeOthers int

	dirty    bool  // the table has changes that are not on disk
	saveErr  error // of the last save
	saved    []byte
	savedFor *[32]byte
	notes    map[string]note // problems by key, until their cause is gone
	subs     map[chan struct{}]struct{}
	plant    plants
}

// plants are bugs that the simulation enables to test that it finds them. All are off
// outside its tests.
type plants struct {
	merge         func(*membership.Table, []Entry) ([]Entry, []membership.Conflict)
	bootstrapLive bool // bootstrap although a seed is in a cluster
	foundAlone    bool // bootstrap without the consent of the other new nodes
	foundAtOnce   bool // bootstrap without waiting for members that call
	forgetLive    bool // forget without its guards
}

// New returns the machine of a node. state is the state on disk, nil if there is none.
// The machine sends nothing before the first Tick.
func New(now time.Time, cfg Config, st *ipam.State, env Env) (*Machine, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Machine{
		cfg: cfg, env: env, rand: cfg.Rand, log: cfg.Logger,
		since: now, started: now,
		table:    new(membership.Table),
		pool:     ipam.NewPool(cfg.Cooldown),
		granted:  make(map[NodeID]uint64),
		promises: make(map[NodeID]promise),
		peers:    make(map[NodeID]ipam.Peer),
		seen:     make(map[NodeID]time.Time),
		departed: make(map[NodeID]bool),
		notes:    make(map[string]note),
		subs:     make(map[chan struct{}]struct{}),
	}
	if s.rand == nil {
		s.rand = rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.pool.Prefer(cfg.PodCIDRs)
	s.confirm.nonce = s.rand.Uint64()
	s.lastSeq = uint64(now.UnixNano())
	s.why = "starting"
	if st != nil {
		if err := s.restore(now, st); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func (c *Config) validate() error {
	c.Cooldown = cmp.Or(c.Cooldown, DefaultCooldown)
	if c.ID.IsZero() {
		return errors.New("the node ID is zero")
	}
	if err := onePerFamily("--cluster-cidr", c.CIDRs); err != nil {
		return err
	}
	if err := onePerFamily("--pod-cidr", c.PodCIDRs); err != nil {
		return err
	}
	if c.Bootstrap || c.ForceBootstrap {
		if len(c.CIDRs) == 0 {
			return errors.New("bootstrap needs the cluster's address space: give --cluster-cidr, e.g. 10.244.0.0/16")
		}
		if _, err := c.families(); err != nil {
			return err
		}
	}
	for _, p := range c.PodCIDRs {
		if len(c.CIDRs) > 0 && !slices.ContainsFunc(c.CIDRs, func(q netip.Prefix) bool { return ipam.Covers(q, p) }) {
			return fmt.Errorf("--pod-cidr %v is outside the cluster CIDR %v: choose a prefix inside it", p, c.CIDRs)
		}
	}
	return nil
}

func onePerFamily(flag string, list []netip.Prefix) error {
	for i, p := range list {
		if !p.IsValid() || p.Addr().Is4In6() || p.Addr().Zone() != "" {
			return fmt.Errorf("%s %v: not an IPv4 or IPv6 prefix", flag, p)
		}
		if p != p.Masked() {
			return fmt.Errorf("%s %v: host bits are set; did you mean %v?", flag, p, p.Masked())
		}
		for _, q := range list[:i] {
			if q.Addr().Is4() == p.Addr().Is4() {
				return fmt.Errorf("%s %v and %v: at most one of each family", flag, q, p)
			}
		}
	}
	return nil
}

// families returns the cluster parameters for a bootstrap.
func (c *Config) families() ([]ipam.Family, error) {
	var out []ipam.Family
	for _, p := range c.CIDRs {
		f := ipam.Family{CIDR: p, BlockLen: cmp.Or(c.BlockLen4, DefaultBlock4)}
		if p.Addr().Is6() {
			f.BlockLen = cmp.Or(c.BlockLen6, DefaultBlock6)
		}
		if err := checkFamily(f); err != nil {
			return nil, err
		}
		out = append(out, f)
	}
	slices.SortFunc(out, func(a, b ipam.Family) int { return a.CIDR.Addr().Compare(b.CIDR.Addr()) })
	return out, nil
}

func checkFamily(f ipam.Family) error {
	if !f.CIDR.IsValid() || f.CIDR != f.CIDR.Masked() {
		return fmt.Errorf("cluster CIDR %v is not a prefix", f.CIDR)
	}
	if limit := f.CIDR.Addr().BitLen() - 2; f.BlockLen < f.CIDR.Bits() || f.BlockLen > limit {
		return fmt.Errorf("--node-prefix-len %d does not fit the cluster CIDR %v: it must be between %d and %d",
			f.BlockLen, f.CIDR, f.CIDR.Bits(), limit)
	}
	return nil
}

// restore loads the state on disk into the machine.
func (s *Machine) restore(now time.Time, st *ipam.State) error {
	if NodeID(st.Node) != s.cfg.ID {
		return fmt.Errorf("the state belongs to node %s, not %s", NodeID(st.Node), s.cfg.ID)
	}
	s.generation = st.Generation
	if ClusterID(st.Cluster).IsZero() {
		return nil
	}
	entries, rest, err := membership.DecodeEntries(st.Table)
	if err == nil && len(rest) > 0 {
		err = errors.New("trailing bytes")
	}
	if err != nil {
		return fmt.Errorf("the table in the state: %w", err)
	}
	for _, f := range st.Families {
		if err := checkFamily(f); err != nil {
			return fmt.Errorf("the state: %w", err)
		}
	}
	s.cluster, s.params = ClusterID(st.Cluster), Params{slices.Clone(st.Families)}
	s.joined, s.left = st.Joined, st.Left
	s.cfg.Fresh = s.cfg.Fresh && !st.Unsure
	s.table.Merge(entries)
	s.openBlocks(st)
	for _, a := range st.Allocations {
		a.Since = now.Add(min(0, a.Since.Sub(now))) // the host's clock was ahead; and whatever it does from now on, this has an age
		s.pool.Adopt(a)
	}
	for _, c := range st.Cooling {
		longest := s.cfg.Cooldown
		if c.Key == "" { // perhaps another node's pod has it
			longest = max(longest, heldFor)
		}
		s.pool.Rest(now, c, longest)
	}
	for _, p := range st.Peers {
		s.peers[NodeID(p.ID)] = p
	}
	for _, id := range st.Departed {
		s.addFormer(NodeID(id))
	}
	for _, g := range st.Granted {
		s.granted[NodeID(g.Node)] = g.Seq
	}
	for _, p := range st.Promises {
		if most := now.Add(promiseLease); p.Until.After(most) { // the host's clock was ahead
			p.Until = most
		}
		s.promises[NodeID(p.Victim)] = promise{NodeID(p.To), p.Until}
	}
	s.setPhase(now, Confirming, "the state on disk has to be confirmed by the members that are alive")
	s.checkParams()
	if s.left {
		s.leave = &leaving{}
		s.setPhase(now, Left, "this node has left the cluster")
	}
	return nil
}

// save saves the present state. On an error the caller must undo its change: the disk then
// has either the old state, or one that nobody knows of and that the next save overwrites.
func (s *Machine) save(now time.Time) error {
	d := s.table.Digest()
	if s.savedFor == nil || *s.savedFor != d {
		s.saved, s.savedFor = membership.AppendEntries(nil, s.table.Entries()), &d
	}
	st := &ipam.State{
		Generation:  s.generation + 1,
		Node:        ipam.ID(s.cfg.ID),
		Cluster:     ipam.ID(s.cluster),
		Families:    s.params.Families,
		Joined:      s.joined,
		Left:        s.left,
		Unsure:      !s.confirm.done && !s.cfg.Fresh,
		Table:       s.saved,
		Blocks:      s.pool.Prefixes(),
		Allocations: s.pool.Allocations(),
		Cooling:     s.pool.Cooling(now),
	}
	for _, id := range sortedKeys(s.peers) {
		st.Peers = append(st.Peers, s.peers[id])
	}
	for _, id := range s.former {
		st.Departed = append(st.Departed, ipam.ID(id))
	}
	for _, id := range sortedKeys(s.granted) {
		st.Granted = append(st.Granted, ipam.Granted{Node: ipam.ID(id), Seq: s.granted[id]})
	}
	maps.DeleteFunc(s.promises, func(_ NodeID, p promise) bool { return !now.Before(p.until) })
	for _, id := range sortedKeys(s.promises) {
		p := s.promises[id]
		st.Promises = append(st.Promises, ipam.Promise{Victim: ipam.ID(id), To: ipam.ID(p.to), Until: p.until})
	}
	s.generation++
	if s.saveErr = s.env.Persist(st); s.saveErr != nil {
		s.dirty = true // the next Tick tries again to save the present state
		return fmt.Errorf("the state cannot be saved: %w", s.saveErr)
	}
	s.dirty = false
	return nil
}

func sortedKeys[V any](m map[NodeID]V) []NodeID {
	keys := make([]NodeID, 0, len(m))
	for id := range m {
		keys = append(keys, id)
	}
	slices.SortFunc(keys, NodeID.Compare)
	return keys
}

func (s *Machine) setPhase(now time.Time, p Phase, why string) {
	if s.phase != p {
		s.log.Info("address space", "phase", p.String(), "why", why)
		s.phase, s.since = p, now
		s.notify()
	}
	s.why = why
}

// send queues a message to one member.
func (s *Machine) send(to NodeID, m message) {
	m.cluster, m.sender = s.cluster, s.cfg.ID
	m.flags |= s.flags()
	s.env.Send(to, m.encode())
}

func (s *Machine) flags() (f uint8) {
	if s.joined {
		f |= flagJoined
	}
	if s.confirm.done {
		f |= flagConfirmed
	}
	if s.left {
		f |= flagLeft
	}
	return f
}

// entriesPerNews keeps a broadcast below the size of a gossip packet: an entry has at
// most 75 bytes (an external IPv6 one), usually 25.
const entriesPerNews = 12

// maxPassedOn bounds how many entries that a push/pull brought are broadcast: 86 messages.
const maxPassedOn = 1024

// tell broadcasts entries, in several messages if necessary. The next push/pull delivers
// entries whose broadcast was lost.
func (s *Machine) tell(entries []Entry) {
	for chunk := range slices.Chunk(entries, entriesPerNews) {
		m := message{kind: kindNews, cluster: s.cluster, sender: s.cfg.ID, flags: s.flags(), entries: chunk}
		s.env.Broadcast(m.encode())
	}
}

// Subscribe returns a channel that receives a value after the table, the blocks or the
// phase has changed, and a function that ends the subscription. The channel holds at most
// one value.
func (s *Machine) Subscribe() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.subs[c] = struct{}{}
	return c, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.subs, c)
	}
}

func (s *Machine) notify() {
	for c := range s.subs {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// name returns the name of a node for people.
func (s *Machine) name(id NodeID) string {
	if id == s.cfg.ID {
		return cmp.Or(s.cfg.Name, id.Short())
	}
	if n := s.peers[id].Name; n != "" {
		return n + " (" + id.Short() + ")"
	}
	return id.Short()
}
