package agent

import (
	"bytes"
	"cmp"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/tunnel"
	"github.com/tulle-net/tulle/tunnel/encap"
	"github.com/tulle-net/tulle/tunnel/path"
)

// sendTrains sends the trains that are due, and the questions about those on their way.
func (p *prober) sendTrains(r path.Report) {
	for _, t := range r.Send {
		packets := make([]tunnel.ProbePacket, len(t.Sizes))
		for i, size := range t.Sizes {
			packets[i] = tunnel.ProbePacket{Payload: appendProbe(nil, probeCar, t.Nonce, size<<8|i), Size: size}
		}
		if err := p.train(t.Peer, t.Mode, packets, t.Apart); err != nil {
			p.log.Debug("train not sent", "peer", t.Peer, "encapsulation", t.Mode, "packets", len(packets), "error", err)
		}
	}
	for _, q := range r.Asks {
		if err := p.send(q.Peer, q.Mode, q.Six, appendProbe(nil, probeAsk, q.Nonce, 0), 0); err != nil {
			p.log.Debug("peer not asked about a train", "peer", q.Peer, "encapsulation", q.Mode, "error", err)
		}
	}
	for _, c := range r.Trains {
		p.tellTrains(c)
	}
}

// tellTrains logs whether trains are sent to a peer.
func (p *prober) tellTrains(c path.TrainChange) {
	if c.Off {
		p.about(c.Peer).Warn("trains are lost where single packets arrive: none are sent", "arrived", c.Arrived, "of", c.Of)
	} else {
		p.about(c.Peer).Info("trains are sent again")
	}
}

// zeros is the padding of a probe.
var zeros [1 << 16]byte

// car notes a packet of a peer's train, if it is whole: as long as it says it is, and padded with zeros.
func (p *prober) car(peer string, mode encap.Mode, nonce uint64, says, size int, payload []byte) {
	rest := payload[probeLen:]
	if says>>8 != size || !bytes.Equal(rest, zeros[:len(rest)]) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paths.Car(peer, mode, nonce, says&0xff)
}

// askedOfTrain tells a peer how many packets of its train have arrived.
func (p *prober) askedOfTrain(peer string, mode encap.Mode, six bool, nonce uint64) {
	p.mu.Lock()
	n, ok := p.paths.Arrived(time.Now(), peer, mode, nonce)
	p.mu.Unlock()
	if !ok {
		return
	}
	if err := p.send(peer, mode, six, appendProbe(nil, probeAnswer, nonce, n), 0); err != nil {
		p.log.Debug("question about a train not answered", "peer", peer, "encapsulation", mode, "error", err)
	}
}

// trains is what is known of trains toward a peer.
func (p *prober) trains(id string) path.TrainInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.paths.Trains(id)
}

// trainProblems names the peers that trains do not reach.
func (s *session) trainProblems(v *view) (out []api.Problem) {
	for i := range v.peers {
		p := &v.peers[i]
		if !p.trains.Off {
			continue
		}
		device := cmp.Or(strings.Join(p.leaves, ", "), s.current().Iface)
		out = append(out, api.Problem{
			What: fmt.Sprintf("trains of packets (UDP_SEGMENT) from kernel %s by %s do not reach %s: of %d packets %d arrived, one by one they arrive. They are sent one by one now, slower",
				kernelRelease(), device, v.label(p), p.trains.Of, p.trains.Arrived),
			Remedy: fmt.Sprintf("update kernel or driver, or try ethtool -K %s tx-udp-segmentation off; trains are tried again after an hour", device),
			Since:  p.trains.Since,
		})
	}
	return out
}

// kernelRelease is what `uname -r` prints.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "of this host"
	}
	return unix.ByteSliceToString(u.Release[:])
}
