// Package direct proves the direct path to peers: the host's own route, without a tunnel.
// A peer in the same subnet is not enough, since many networks and hosts drop packets
// with pod addresses.
//
// A [Prober] has a TUN device of its own, which looks to the host like a pod: the kernel
// forwards a probe from there to the peer's next hop, and on the peer's side from the
// underlay to the peer's device of this kind. So a probe meets what a pod's packet meets:
// both hosts' firewalls, forwarding and reverse path filters, and the network between
// them. internal/hostnet makes the routes: a table that only this device uses, with
// nothing but the next hops of peers, so that no probe goes through the tunnel.
//
// Run reads on one goroutine. Probe and Update may be called from any.
package direct

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/header"
)

// Errors of Probe.
var (
	ErrNoPeer    = errors.New("no such peer")
	ErrNoAddress = errors.New("no addresses of that family for direct probes on both sides")
)

// Peer is where probes go. Addresses are at most one of each family: IPv4, IPv6.
type Peer struct {
	Tun   [2]netip.Addr // source of its probes
	Probe [2]netip.Addr // destination of ours
}

// Config of a Prober.
type Config struct {
	Name  string // of the device, at most 15 bytes
	Alias string // of the device
	// Probed is called for each probe of a peer, on the goroutine of Run: it must not
	// block, and payload is valid only during the call. size is the packet's, in bytes.
	Probed func(peer string, mode encap.Mode, payload []byte, size int)
	// Reopened, if not nil, is called when somebody has removed the device and Run has made it again: without routes, which
	// whoever made them has to make again, too.
	Reopened func()
}

// Prober sends and receives probes.
type Prober struct {
	cfg      Config
	stopping atomic.Bool
	closing  sync.Once

	mu    sync.Mutex     // guards what follows, and writing
	dev   *device.Device // another one only in Run, which reads it without mu
	local Peer
	peers map[string]Peer
	ids   map[netip.Addr]string // by a peer's tun address
	buf   []byte

	source    uint16 // port of this node's probes
	portSince time.Time

	sent, received atomic.Uint64
}

// portFor is how long probes have one source port. The kernel tracks them as a connection, and a rule of NAT that comes later (a host that
// masquerades all that leaves) is for new connections only: it changes the pods' packets, and would never change probes of an old one.
const portFor = 10 * time.Second

// deviceMTU lets every packet pass that a link may take: the link of the next hop decides.
const deviceMTU = 65535

// Open makes the device, which is gone when the process ends.
func Open(cfg Config) (*Prober, error) {
	dev, err := openDevice(cfg)
	if err != nil {
		return nil, err
	}
	return &Prober{cfg: cfg, dev: dev}, nil
}

func openDevice(cfg Config) (*device.Device, error) {
	return device.Open(device.Options{Name: cfg.Name, Alias: cfg.Alias, MTU: deviceMTU, Remedy: "give that one another name, and restart the agent"})
}

// Device is the device's name.
func (p *Prober) Device() string { return p.cfg.Name }

// Update replaces this node's addresses (Tun is the source of its probes, Probe where those
// of others arrive) and the peers.
func (p *Prober) Update(local Peer, peers map[string]Peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.local, p.peers = local, peers
	p.ids = make(map[netip.Addr]string, 2*len(peers))
	for id, peer := range peers {
		for _, a := range peer.Tun {
			if a.IsValid() {
				p.ids[a] = id
			}
		}
	}
}

// Stats are the probes sent and received.
func (p *Prober) Stats() (sent, received uint64) { return p.sent.Load(), p.received.Load() }

// family is the index of a mode's addresses.
func family(m encap.Mode) int {
	if m == encap.Direct6 {
		return 1
	}
	return 0
}

// Probe sends payload to a peer in a packet of size bytes, or as few as payload needs, of
// the mode's family.
func (p *Prober) Probe(peer string, m encap.Mode, payload []byte, size int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	to, ok := p.peers[peer]
	if !ok {
		return fmt.Errorf("probe %s: %w", peer, ErrNoPeer)
	}
	src, dst := p.local.Tun[family(m)], to.Probe[family(m)]
	if !src.IsValid() || !dst.IsValid() {
		return fmt.Errorf("probe %s: %w", peer, ErrNoAddress)
	}
	if p.stopping.Load() {
		return fmt.Errorf("probe %s: %w", peer, device.ErrGone)
	}
	from := netip.AddrPortFrom(src, p.port(time.Now()))
	p.buf = encap.AppendProbeFrom(append(p.buf[:0], make([]byte, device.VnetHdrLen)...), from, dst, payload, size)
	if err := p.dev.Queues()[0].Write([][]byte{p.buf}); err != nil {
		return fmt.Errorf("probe %s by %s: %w", peer, m, err)
	}
	p.sent.Add(1)
	return nil
}

// port is the source port of probes, another one every portFor. The caller holds mu.
func (p *Prober) port(now time.Time) uint16 {
	if now.Sub(p.portSince) >= portFor {
		p.source, p.portSince = encap.SourcePort(rand.Uint32()), now
	}
	return p.source
}

// Run receives probes until ctx is done. It makes the device again if somebody removes it.
func (p *Prober) Run(ctx context.Context) error {
	defer p.stopping.Store(true)
	buf := make([]byte, device.VnetHdrLen+device.MaxPacket)
	for {
		err := p.dev.Queues()[0].Receive(ctx, buf, p.packet)
		if errors.Is(err, device.ErrGone) {
			err = p.reopen()
		} else if err == nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("direct probes: %w", err)
		}
	}
}

// reopen makes the device again.
func (p *Prober) reopen() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	dev, err := openDevice(p.cfg)
	if err != nil {
		return fmt.Errorf("%s was removed: %w", p.cfg.Name, err)
	}
	_ = p.dev.Close() // of a device that is not there
	p.dev = dev
	if p.cfg.Reopened != nil {
		p.cfg.Reopened()
	}
	return nil
}

// packet looks whether a packet, behind its virtio-net header, is a probe for this node. Anything else is none of ours: the
// kernel's own multicast, or somebody who pings the address.
func (p *Prober) packet(b []byte) {
	const gsoNone, offGSOType = 0, 1
	if len(b) <= device.VnetHdrLen || b[offGSOType] != gsoNone {
		return
	}
	pkt := b[device.VnetHdrLen:]
	var in header.Inner
	if header.ParseInner(pkt, &in) != nil || in.Proto != header.ProtoUDP || in.Fragment || in.DstPort != encap.ProbePort {
		return
	}
	body := in.Payload(pkt)
	if len(body) <= header.UDPLen {
		return
	}
	m, f := encap.Direct, 0
	if in.Src.Is6() {
		m, f = encap.Direct6, 1
	}
	p.mu.Lock()
	id, ok := p.ids[in.Src]
	ok = ok && in.Dst == p.local.Probe[f]
	p.mu.Unlock()
	if !ok {
		return
	}
	p.received.Add(1)
	p.cfg.Probed(id, m, body[header.UDPLen:], in.Length)
}

// Close removes the device. Run must have ended. Closing twice is not an error.
func (p *Prober) Close() error {
	var err error
	p.closing.Do(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.stopping.Store(true)
		err = p.dev.Close()
	})
	return err
}
