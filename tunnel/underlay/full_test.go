package underlay

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Where the device is slower than the sender, Send waits for room and loses
// nothing, single datagrams and trains alike.
func TestSendBufferFull(t *testing.T) {
	l := newLink(t, 1500)
	var noQdisc error
	l.a.Netlink(func(nl *sys.Netlink) error {
		link, err := nl.LinkByName("eth0")
		if err != nil {
			return err
		}
		noQdisc = nl.QdiscAdd(&netlink.Tbf{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			Rate:       5 << 20, Limit: 4 << 20, Buffer: 64 << 10, // bytes a second, bytes queued at most, bytes a burst
		})
		return nil
	})
	if errors.Is(noQdisc, unix.ENOENT) || errors.Is(noQdisc, unix.EOPNOTSUPP) {
		t.Skipf("this kernel has no token bucket filter: %v", noQdisc)
	} else if noQdisc != nil {
		t.Fatal(noQdisc)
	}
	eachFamily(t, func(t *testing.T, six bool) {
		from := l.a.udp(Options{Bind: netipPort(addrA[six], 0), SendBuf: 8 << 10})
		to := l.b.udp(Options{Bind: netipPort(addrB[six], 0)})
		dest := NewDest(to.Local())
		b := NewSendBatch(64, 64)
		// An error nobody has collected makes the socket ready for poll at any time.
		b.Begin(NewDest(netipPort(addrB[six], 9)), 0)
		b.Append([]byte("nobody"))
		b.End(0)
		if _, err := from.Send(b); err != nil {
			t.Fatal(err)
		}
		timer := wakeLater(from)
		if _, err := from.Wait(); err != sys.ErrErrQueue {
			t.Fatalf("Wait: %v", err)
		}
		timer.Stop()
		const batches, each = 4, 64
		for k := range batches {
			for i := range each {
				b.Begin(dest, 0)
				b.Append(pattern(k*each+i, 1000))
				b.End(500 * (i % 2))
			}
			res, err := from.Send(b)
			if err != nil || res.Dropped != 0 || res.Sent != each/2+each/2*2 {
				t.Fatalf("Send: %+v, %v", res, err)
			}
		}
		var got []byte
		for _, p := range collect(t, to, batches*each*3/2) {
			got = append(got, p.data...)
		}
		for i := range batches * each {
			if !bytes.Equal(got[i*1000:(i+1)*1000], pattern(i, 1000)) {
				t.Fatalf("message %d differs", i)
			}
		}
		if !dest.GSO() {
			t.Error("a full buffer switched trains off")
		}
	})
}
