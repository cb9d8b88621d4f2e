package fastpath

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The program that is embedded is made from fastpath.bpf.c, by `make generate`.
//
//go:generate go tool bpf2go -cc clang-14 -strip llvm-strip-14 -cflags "-O2 -g -Wall -Werror" -target bpfel -type way -type counts -type settings -type prefix programs fastpath.bpf.c -- -I/usr/include/x86_64-linux-gnu -I/usr/include/aarch64-linux-gnu

// Path has the programs and their tables in the kernel.
type Path struct {
	nl       *sys.Netlink
	programs programsObjects

	mu         sync.Mutex
	numbers    map[string]uint32 // of peers, by ID
	next       uint32            // the number of the next new peer
	have       tables            // what is in the kernel's maps
	on         programsSettings
	paused     bool              // by Pause, which has to be repeated
	generation uint32            // of the tables
	past       Counts            // of peers that are gone
	swept      bool              // filters of an earlier run are gone
	attached   map[filter]string // ours: the programs' names
}

// Open loads the programs. They do nothing before the first Update. It needs CAP_BPF and CAP_NET_ADMIN.
func Open() (*Path, error) {
	p := &Path{
		numbers: map[string]uint32{}, next: firstPeer, attached: map[filter]string{},
		have: tables{map[programsPrefix]uint32{}, map[programsAddr]uint32{}, map[uint32]programsWay{}, map[uint32]struct{}{}},
	}
	var err error
	if p.nl, err = sys.NewNetlink(-1); err != nil {
		return nil, err
	}
	if err := loadProgramsObjects(&p.programs, nil); err != nil {
		p.nl.Close()
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("load the BPF programs: %w: they need CAP_BPF, and the system call bpf(2)", err)
		}
		return nil, fmt.Errorf("load the BPF programs: %w", err)
	}
	return p, nil
}

// Close forgets the programs, which go on in the kernel (see [Remove]), also if they were paused.
func (p *Path) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = false
	err := p.set(p.on)
	p.nl.Close()
	return errors.Join(err, p.programs.Close())
}

// Update makes the kernel carry what s says, and nothing else. Where that fails, the agent carries it.
func (p *Path) Update(s State) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.Off != "" {
		return errors.Join(p.off(), removeJoint(p.nl))
	}
	tun, err := p.nl.LinkByName(s.TUN)
	if err != nil {
		return errors.Join(fmt.Errorf("fast path: TUN device %s: %w", s.TUN, err), p.off())
	}
	p.forget(s.Peers)
	index := p.links(s)
	if len(s.Links) > 0 && !slices.ContainsFunc(s.Links, func(name string) bool { return index[name] != 0 }) {
		return errors.Join(fmt.Errorf("fast path: packets of peers arrive on %s, and the programs take them only from Ethernet devices", strings.Join(s.Links, ", ")), p.off(), removeJoint(p.nl))
	}
	want := build(s, p.number, func(name string) uint32 { return index[name] })
	if err := p.fill(want); err != nil {
		return errors.Join(err, p.off())
	}
	filters := map[filter]string{{tun.Attrs().Index, netlink.HANDLE_MIN_EGRESS}: send}
	for _, name := range s.Links {
		if i := index[name]; i != 0 {
			filters[filter{int(i), netlink.HANDLE_MIN_INGRESS}] = receive
		}
	}
	p.generation = max(p.generation+1, 1)
	settings := programsSettings{On: 1, Tun: uint32(tun.Attrs().Index), Generation: p.generation}
	if s.Port != 0 {
		in, out, err := makeJoint(p.nl)
		if err != nil {
			return errors.Join(err, p.off())
		}
		settings.Port, settings.Joint = uint32(s.Port), uint32(in)
		filters[filter{out, netlink.HANDLE_MIN_INGRESS}] = deliver
	}
	if p.on.On == 0 {
		ready := settings
		ready.On = 0
		err = p.set(ready)
	}
	if err = errors.Join(err, p.attach(filters)); err != nil {
		return errors.Join(err, p.off())
	}
	if err := p.set(settings); err != nil || s.Port != 0 {
		return err
	}
	return removeJoint(p.nl)
}

// off leaves everything to the agent.
func (p *Path) off() error { return errors.Join(p.set(programsSettings{Tun: p.on.Tun}), p.attach(nil)) }

// links returns the indices of the Ethernet devices among those that s names.
func (p *Path) links(s State) map[string]uint32 {
	names := map[string]uint32{}
	for _, n := range s.Links {
		names[n] = 0
	}
	for _, peer := range s.Peers {
		if peer.Way != nil {
			names[peer.Way.Link] = 0
		}
	}
	for n := range names {
		if l, err := p.nl.LinkByName(n); err == nil && l.Attrs().EncapType == "ether" {
			names[n] = uint32(l.Attrs().Index)
		}
	}
	return names
}

// number returns the number of a peer.
func (p *Path) number(id string) uint32 {
	n, ok := p.numbers[id]
	if !ok {
		n = p.next
		p.numbers[id] = n
		p.next++
	}
	return n
}

// forget gives up the numbers of all but these peers, and keeps what was counted.
func (p *Path) forget(peers []Peer) {
	keep := map[string]bool{}
	for i := range peers {
		keep[peers[i].ID] = true
	}
	for id := range p.numbers {
		if !keep[id] {
			p.past = p.past.Plus(p.count(id))
			delete(p.numbers, id)
		}
	}
}

// fill changes the kernel's maps. What is no longer wanted goes first; what is carried needs its counters.
func (p *Path) fill(want tables) error {
	m := &p.programs.programsMaps
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return fmt.Errorf("fast path: %w", err)
	}
	zero := make([]programsCounts, cpus)
	return errors.Join(
		remove(m.Ways, p.have.ways, want.ways),
		remove(m.Hosts, p.have.hosts, want.hosts),
		remove(m.Spaces, p.have.spaces, want.spaces),
		remove(m.Counters, p.have.counters, want.counters),
		add(m.Counters, p.have.counters, want.counters, func(struct{}) any { return zero }),
		add(m.Spaces, p.have.spaces, want.spaces, func(v uint32) any { return v }),
		add(m.Hosts, p.have.hosts, want.hosts, func(v uint32) any { return v }),
		add(m.Ways, p.have.ways, want.ways, func(v programsWay) any { return v }),
	)
}

// remove takes out of a map what is not wanted, and out of have what it has taken.
func remove[K, V comparable](m *ebpf.Map, have, want map[K]V) error {
	var errs []error
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("fast path: %v: delete: %w", m, err))
			continue
		}
		delete(have, k)
	}
	return errors.Join(errs...)
}

// add puts into a map what is wanted, and into have what it has put there.
func add[K, V comparable](m *ebpf.Map, have, want map[K]V, value func(V) any) error {
	for k, v := range want {
		if was, ok := have[k]; ok && was == v {
			continue
		}
		if err := m.Put(k, value(v)); err != nil {
			return fmt.Errorf("fast path: %v of %d entries: %w", m, m.MaxEntries(), err)
		}
		have[k] = v
	}
	return nil
}

// set writes the settings, and for how long the programs are paused, if they are.
func (p *Path) set(s programsSettings) error {
	p.on = s
	if p.paused {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
			return fmt.Errorf("fast path: clock: %w", err)
		}
		s.Paused = uint64(now.Nano() + pauseLasts.Nanoseconds())
	}
	if err := p.programs.Setting.Put(uint32(0), s); err != nil {
		return fmt.Errorf("fast path: switch: %w", err)
	}
	return nil
}

// pauseLasts is how long a pause lasts that nobody prolongs. So an agent that is killed meanwhile does not take the network with it. It is shorter than
// other hosts wait before they give a silent one up.
const pauseLasts = 4 * time.Second

// Pause leaves everything to the agent, which alone can show packets to somebody, until it is called with false. Whoever wants it to last has to call it
// again every second: it ends by itself after pauseLasts.
func (p *Path) Pause(on bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = on
	return p.set(p.on)
}

// Counts are packets and super-packets of the pods, and their bytes.
type Counts struct {
	TxPackets, TxBytes, RxPackets, RxBytes uint64
	Lost                                   uint64 // to which the kernel could not add a header
}

// Plus is the sum of both.
func (c Counts) Plus(d Counts) Counts {
	return Counts{c.TxPackets + d.TxPackets, c.TxBytes + d.TxBytes, c.RxPackets + d.RxPackets, c.RxBytes + d.RxBytes, c.Lost + d.Lost}
}

// Counts returns what was carried to and from a peer; zero if there is none of that ID.
func (p *Path) Counts(id string) Counts {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count(id)
}

// Peers returns the IDs of the peers that are counted.
func (p *Path) Peers() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Collect(maps.Keys(p.numbers))
}

// Total returns what was carried to and from all peers, also those that are gone.
func (p *Path) Total() Counts {
	p.mu.Lock()
	defer p.mu.Unlock()
	sum := p.past
	for id := range p.numbers {
		sum = sum.Plus(p.count(id))
	}
	return sum
}

func (p *Path) count(id string) (sum Counts) {
	n, ok := p.numbers[id]
	var each []programsCounts
	if !ok || p.programs.Counters.Lookup(n, &each) != nil {
		return sum
	}
	for _, e := range each {
		sum = sum.Plus(Counts{e.TxPackets, e.TxBytes, e.RxPackets, e.RxBytes, e.Lost})
	}
	return sum
}
