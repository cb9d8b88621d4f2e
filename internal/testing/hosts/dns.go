package hosts

import (
	"net"
	"net/netip"
	"sync"

	"golang.org/x/net/dns/dnsmessage"
)

// DNS is a name server that runs on a host until the test ends. Its methods may be called at any time.
type DNS struct {
	mu    sync.Mutex
	names map[string][]netip.Addr
	hangs bool
	fails bool
	asked int
}

// DNS starts a name server on port 53 of an address of the host. Names that it does not know do not exist (NXDOMAIN).
func (h *Host) DNS(addr string) *DNS {
	t := h.net.t
	t.Helper()
	var conn *net.UDPConn
	h.net.check(h.Do(func() (err error) {
		conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 53)))
		return err
	}))
	d := &DNS{names: map[string][]netip.Addr{}}
	var serving sync.WaitGroup
	serving.Go(func() { d.serve(conn) })
	t.Cleanup(func() {
		conn.Close()
		serving.Wait()
	})
	return d
}

// Set gives a name, without a dot at its end, its addresses of both families. Without addresses the name does not exist.
func (d *DNS) Set(name string, addrs ...string) {
	var all []netip.Addr
	for _, a := range addrs {
		all = append(all, netip.MustParseAddr(a))
	}
	d.change(func() { d.names[name+"."] = all })
}

// Hang makes the server swallow every question, or answer again.
func (d *DNS) Hang(on bool) { d.change(func() { d.hangs = on }) }

// Fail makes the server answer every question with SERVFAIL, or properly again.
func (d *DNS) Fail(on bool) { d.change(func() { d.fails = on }) }

func (d *DNS) change(fn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fn()
}

// Asked is how many questions have come.
func (d *DNS) Asked() (n int) {
	d.change(func() { n = d.asked })
	return n
}

func (d *DNS) serve(conn *net.UDPConn) {
	buf := make([]byte, 4096)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		if answer := d.answer(buf[:n]); answer != nil {
			_, _ = conn.WriteToUDPAddrPort(answer, from)
		}
	}
}

// answer is nil where there is none.
func (d *DNS) answer(question []byte) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked++
	var m dnsmessage.Message
	if d.hangs || m.Unpack(question) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	m.Header = dnsmessage.Header{ID: m.ID, Response: true, RecursionDesired: m.RecursionDesired, RecursionAvailable: true}
	m.Answers, m.Authorities, m.Additionals = nil, nil, nil
	addrs := d.names[q.Name.String()]
	switch {
	case d.fails:
		m.RCode = dnsmessage.RCodeServerFailure
	case len(addrs) == 0:
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addrs {
		head := dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: 1}
		switch {
		case d.fails:
		case q.Type == dnsmessage.TypeA && a.Is4():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AResource{A: a.As4()}})
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	out, err := m.Pack()
	if err != nil {
		return nil
	}
	return out
}
