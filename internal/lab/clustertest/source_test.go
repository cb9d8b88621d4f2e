package clustertest

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/podnet"
)

// TestPodSources: what a pod sends under a foreign address is dropped and shown by the agent, and the checks come back by
// themselves after somebody has flushed nftables.
func TestPodSources(t *testing.T) {
	t.Parallel()
	l := up(t, "source", lab.Options{Nodes: 1, Pods: 2})
	pods := l.Pods()
	to := mustStatus(t, l, "h1").Node.Underlay[0]
	spoof := func(from netip.Addr) error { return sendAs(l, pods[0].Name, from, to) }

	before := mustStatus(t, l, "h1")
	for _, from := range []netip.Addr{pods[1].Addresses[0], to} {
		if err := spoof(from); err != nil {
			t.Fatal(err)
		}
	}
	if err := spoof(pods[0].Addresses[0]); err != nil { // its own
		t.Fatal(err)
	}
	until(t, "the 2 packets under foreign addresses are counted, and no other", func() error {
		after := mustStatus(t, l, "h1")
		if n := after.Drops[podnet.DropSource] - before.Drops[podnet.DropSource]; n != 2 {
			return fmt.Errorf("%d packets counted as %s: %v", n, podnet.DropSource, after.Drops)
		}
		return nil
	})

	err := l.Do("h1", func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		c.FlushRuleset()
		return c.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the checks come back", func() error {
		if err := spoof(to); err != nil {
			return err
		}
		st := mustStatus(t, l, "h1")
		if st.Drops[podnet.DropSource] == 0 || st.Counters.Repairs < before.Counters.Repairs+2 {
			return fmt.Errorf("drops %v, %d repairs", st.Drops, st.Counters.Repairs)
		}
		return nil
	})
}

// sendAs sends an empty UDP packet from a pod under any address.
func sendAs(l *lab.Lab, pod string, from, to netip.Addr) error {
	ip := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: from.AsSlice(), DstIP: to.AsSlice()}
	udp := &layers.UDP{SrcPort: 9, DstPort: 9}
	if err := udp.SetNetworkLayerForChecksum(ip); err != nil {
		return err
	}
	buf := gopacket.NewSerializeBuffer()
	if err := gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ip, udp); err != nil {
		return err
	}
	return l.Do(pod, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, buf.Bytes(), 0, &unix.SockaddrInet4{Addr: to.As4()})
	})
}
