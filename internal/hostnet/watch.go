package hostnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Watch calls changed when something on the host changed that concerns us: one of our
// routes, policy rules, addresses or sysctls, the TUN device, the nftables table; a foreign policy rule that may come before ours, or route
// within the cluster's space; a route to a pod that somebody takes away; a default route, a route to a member or an address of another device, by which
// the underlay may have moved; an uplink's MTU. What a Reconcile does itself is not reported, unless
// another one with another State has begun before its events were read.
//
// It calls changed a first time as soon as it listens, so that nothing is missed between
// an earlier Reconcile and then. Events are gathered for Options.Debounce, calls never
// overlap, and Watch returns nil when ctx ends. Not every sysctl tells (the kernel's RTM_NEWNETCONF has
// forwarding and rp_filter), so a slow periodic Reconcile belongs beside it.
func (r *Reconciler) Watch(ctx context.Context, changed func()) error {
	var route, nft *nl.Conn
	err := r.ns.do(func() error {
		var err error
		if route, err = listen(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
			unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF); err != nil {
			return err
		}
		nft, err = listen(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
		return err
	})
	if err != nil {
		if route != nil {
			route.Close()
		}
		return err
	}
	events := make(chan struct{}, 1)
	failed := make(chan error, 2)
	var wg sync.WaitGroup
	for _, w := range []struct {
		conn     *nl.Conn
		concerns func(nl.Message) bool
	}{{route, r.routeEvent}, {nft, r.nftEvent}} {
		wg.Go(func() {
			if err := receive(ctx, w.conn, w.concerns, events); err != nil {
				failed <- err
			}
		})
	}
	defer wg.Wait()
	defer nft.Close()
	defer route.Close()
	for {
		changed()
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return fmt.Errorf("hostnet: watch the host's network: %w", err)
		case <-events:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(r.opts.Debounce):
		}
		select { // what came meanwhile is told by this call
		case <-events:
		default:
		}
	}
}

var native = binary.NativeEndian

// watchBuffer is the receive buffer of an event socket in bytes. When it runs over
// all the same, the loss counts as an event.
const watchBuffer = 4 << 20

func listen(protocol int, groups ...uint32) (*nl.Conn, error) {
	c, err := nl.Dial(protocol, nil)
	if err != nil {
		return nil, fmt.Errorf("hostnet: open a netlink socket: %w", err)
	}
	_ = c.SetReadBuffer(watchBuffer) // best effort, see there
	for _, g := range groups {
		if err := c.JoinGroup(g); err != nil {
			c.Close()
			return nil, fmt.Errorf("hostnet: join netlink group %d of protocol %d: %w", g, protocol, err)
		}
	}
	return c, nil
}

// receive reads events until ctx has ended and the socket is closed.
func receive(ctx context.Context, c *nl.Conn, concerns func(nl.Message) bool, events chan<- struct{}) error {
	for {
		msgs, err := c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !errors.Is(err, unix.ENOBUFS): // there, any of the lost events may concern us
			return err
		}
		if err != nil || slices.ContainsFunc(msgs, concerns) {
			select {
			case events <- struct{}{}:
			default:
			}
		}
	}
}

// nftEvent: whatever names our table and does not come from our own socket, and the end of the table of pods' source checks, whose chains come
// and go with pods.
func (r *Reconciler) nftEvent(m nl.Message) bool {
	const header = 4 // struct nfgenmsg: family, version, res_id
	kind := uint16(m.Header.Type)
	if m.Header.PID == r.nft.port.Load() || kind>>8 != unix.NFNL_SUBSYS_NFTABLES || kind&0xff == unix.NFT_MSG_NEWGEN || len(m.Data) < header {
		return false
	}
	ad, err := nl.NewAttributeDecoder(m.Data[header:])
	if err != nil {
		return false
	}
	for ad.Next() {
		// The table's name is attribute 1 of tables, chains, rules, sets and their elements.
		if ad.Type() != unix.NFTA_TABLE_NAME {
			continue
		}
		switch m.Data[0] {
		case unix.NFPROTO_INET:
			return ad.String() == Table
		case unix.NFPROTO_NETDEV:
			return kind&0xff == unix.NFT_MSG_DELTABLE && ad.String() == r.opts.PodsTable
		}
		return false
	}
	return false
}

// routeEvent compares an event with what is wanted: our own doing agrees with it.
func (r *Reconciler) routeEvent(m nl.Message) bool {
	r.wantMu.Lock()
	w := r.want
	r.wantMu.Unlock()
	if w.removed {
		return false
	}
	switch t := uint16(m.Header.Type); t {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		carrier := r.carrierEvent(&w, m.Data)
		return w.linkEvent(t == unix.RTM_NEWLINK, m.Data) || carrier
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return w.addrEvent(t == unix.RTM_NEWADDR, m.Data)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		route, ok := parseRoute(m.Data)
		return ok && (w.routeEvent(t == unix.RTM_NEWROUTE, &route) || t == unix.RTM_DELROUTE && r.podLost(&w, &route))
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return w.ruleEvent(t == unix.RTM_NEWRULE, m.Data)
	case unix.RTM_NEWNETCONF:
		return w.netconfEvent(m.Data)
	}
	return false
}

// carrierEvent reports that an uplink has lost its carrier or got it back, which changes no route.
func (r *Reconciler) carrierEvent(w *wanted, b []byte) bool {
	if len(b) < unix.SizeofIfInfomsg {
		return false
	}
	lost := native.Uint32(b[8:])&unix.IFF_RUNNING == 0
	name := ""
	sys.EachAttr(b[unix.SizeofIfInfomsg:], func(t uint16, v []byte) {
		if t == unix.IFLA_IFNAME {
			name = sys.CString(v)
		}
	})
	r.wantMu.Lock()
	defer r.wantMu.Unlock()
	if _, uplink := w.uplinks[name]; !uplink || r.lostCarrier[name] == lost {
		return false
	}
	r.lostCarrier[name] = lost
	return true
}

func (w *wanted) linkEvent(isNew bool, b []byte) bool {
	if len(b) < unix.SizeofIfInfomsg {
		return false
	}
	index := int(int32(native.Uint32(b[4:])))
	flags := native.Uint32(b[8:])
	var name string
	var mtu int
	sys.EachAttr(b[unix.SizeofIfInfomsg:], func(t uint16, v []byte) {
		switch {
		case t == unix.IFLA_IFNAME:
			name = sys.CString(v)
		case t == unix.IFLA_MTU && len(v) == 4:
			mtu = int(native.Uint32(v))
		}
	})
	if name != w.tun && (w.index == 0 || index != w.index) {
		known, ok := w.uplinks[name]
		was, renamed := w.numbers[index]
		return ok && (!isNew || mtu != known) || renamed && was != name
	}
	return !isNew || name != w.tun || index != w.index || flags&unix.IFF_UP == 0 || w.mtu != 0 && mtu != w.mtu
}

func (w *wanted) addrEvent(isNew bool, b []byte) bool {
	if len(b) < unix.SizeofIfAddrmsg {
		return false
	}
	bits, scope, index := int(b[1]), b[3], int(native.Uint32(b[4:]))
	var local, address netip.Addr
	sys.EachAttr(b[unix.SizeofIfAddrmsg:], func(t uint16, v []byte) {
		switch t {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(v)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(v)
		}
	})
	if !local.IsValid() {
		local = address
	}
	if index == w.index {
		return isNew != (w.addrs[local] && bits == local.BitLen())
	}
	if scope != unix.RT_SCOPE_UNIVERSE {
		return false
	}
	return !slices.ContainsFunc(w.own, func(p netip.Prefix) bool { return p.Contains(local) })
}

// routeMsg is what an event tells of a route.
type routeMsg struct {
	v4     bool
	table  uint32
	proto  byte
	kind   byte
	dst    netip.Prefix // not valid of a default route
	metric uint32
	spec   routeSpec
}

// parseRoute reads an event; ok is false for what is no route of a table.
func parseRoute(b []byte) (m routeMsg, ok bool) {
	const cloned = unix.RTM_F_CLONED
	if len(b) < unix.SizeofRtMsg || b[0] != unix.AF_INET && b[0] != unix.AF_INET6 || native.Uint32(b[8:])&cloned != 0 {
		return m, false
	}
	bits := int(b[1])
	m.v4, m.table, m.proto, m.kind = b[0] == unix.AF_INET, uint32(b[4]), b[5], b[7]
	var dst netip.Addr
	sys.EachAttr(b[unix.SizeofRtMsg:], func(t uint16, v []byte) {
		switch {
		case t == unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case t == unix.RTA_PREFSRC:
			m.spec.src, _ = netip.AddrFromSlice(v)
		case t == unix.RTA_GATEWAY:
			m.spec.via, _ = netip.AddrFromSlice(v)
		case t == unix.RTA_METRICS:
			sys.EachAttr(v, func(t uint16, v []byte) {
				if t == unix.RTAX_MTU && len(v) == 4 {
					m.spec.mtu = int(native.Uint32(v))
				}
			})
		case len(v) != 4:
		case t == unix.RTA_TABLE:
			m.table = native.Uint32(v)
		case t == unix.RTA_OIF:
			m.spec.link = int(native.Uint32(v))
		case t == unix.RTA_PRIORITY:
			m.metric = native.Uint32(v)
		}
	})
	if m.kind == unix.RTN_UNREACHABLE {
		m.spec = routeSpec{unreachable: true}
	}
	if bits > 0 {
		m.dst = netip.PrefixFrom(dst, bits)
	}
	return m, true
}

func (w *wanted) routeEvent(isNew bool, m *routeMsg) bool {
	if m.table == HostsTable || m.table == DirectTable {
		dst := m.dst
		if !dst.IsValid() {
			dst = netip.PrefixFrom(unspecified(m.v4), 0)
		}
		want, ok := w.tables[tableKey{m.table, dst}]
		if m.proto != Protocol {
			return ok // a rival came, perhaps in the place of ours, or went
		}
		return isNew != (ok && (!isNew || m.spec == want))
	}
	if m.table != unix.RT_TABLE_MAIN {
		return false
	}
	if !m.dst.IsValid() {
		return m.kind == unix.RTN_UNICAST
	}
	key := routeKey{m.dst, m.metric}
	if m.proto == Protocol {
		want, ok := w.routes[key]
		return isNew != (ok && (!isNew || m.spec == want))
	}
	if w.prefixes[key.prefix] {
		return true // a rival came, perhaps in the place of ours, or went
	}
	if _, toMember := firstInside(w.members, key.prefix); toMember && m.kind == unix.RTN_UNICAST {
		return true // the way there may be another one now, with another MTU
	}
	return m.spec.link != w.index && w.inCluster(m.dst) && !w.inOwn(m.dst)
}

func (w *wanted) inCluster(p netip.Prefix) bool {
	return slices.ContainsFunc(w.clusters, func(c netip.Prefix) bool { return contains(c, p) })
}

func (w *wanted) inOwn(p netip.Prefix) bool {
	return slices.ContainsFunc(w.own, func(o netip.Prefix) bool { return contains(o, p) })
}

// podLost reports whether a route that was removed was that to a pod whose link is still up, so that somebody has taken it. The routes of a link
// that goes are removed when it is down already.
func (r *Reconciler) podLost(w *wanted, m *routeMsg) bool {
	if m.table != unix.RT_TABLE_MAIN || m.kind != unix.RTN_UNICAST || m.proto == Protocol || !m.dst.IsValid() || !m.dst.IsSingleIP() || !w.inOwn(m.dst) {
		return false
	}
	l, err := r.rt.LinkByIndex(m.spec.link)
	return err == nil && l.Attrs().RawFlags&unix.IFF_UP != 0
}

// ruleEvent knows our rules as reconcile does: nobody else has one that leads to a table of ours. Those of others concern us where they may
// come before ours.
func (w *wanted) ruleEvent(isNew bool, b []byte) bool {
	const header = 12 // struct fib_rule_hdr (linux/fib_rules.h)
	if len(b) < header || b[0] != unix.AF_INET && b[0] != unix.AF_INET6 {
		return false
	}
	var src netip.Addr
	key := ruleKey{v4: b[0] == unix.AF_INET, table: uint32(b[4])}
	sys.EachAttr(b[header:], func(t uint16, v []byte) {
		switch {
		case t == unix.FRA_SRC:
			src, _ = netip.AddrFromSlice(v)
		case t == unix.FRA_IIFNAME:
			key.iif = sys.CString(v)
		case len(v) != 4:
		case t == unix.FRA_TABLE:
			key.table = native.Uint32(v)
		case t == unix.FRA_PRIORITY:
			key.rank = native.Uint32(v)
		}
	})
	if src.IsValid() {
		key.from = netip.PrefixFrom(src, int(b[2]))
	}
	if key.table == HostsTable || key.table == DirectTable {
		return isNew != w.rules[key]
	}
	return foreignRule(int(key.table)) && key.rank > 0 && key.rank <= DirectTable
}

// netconf attributes (linux/netconf.h).
const (
	netconfaIfindex    = 1
	netconfaForwarding = 2
	netconfaRPFilter   = 3
	netconfHeader      = 4 // struct netconfmsg: the family, padded
	netconfAll         = -1
)

func (w *wanted) netconfEvent(b []byte) bool {
	if len(b) < netconfHeader {
		return false
	}
	v4 := b[0] == unix.AF_INET
	if v4 && !w.v4 || !v4 && !w.v6 {
		return false
	}
	index, forwarding, filter := 0, int32(1), int32(2)
	sys.EachAttr(b[netconfHeader:], func(t uint16, v []byte) {
		if len(v) != 4 {
			return
		}
		n := int32(native.Uint32(v))
		switch t {
		case netconfaIfindex:
			index = int(n)
		case netconfaForwarding:
			forwarding = n
		case netconfaRPFilter:
			filter = n
		}
	})
	return (index == w.index || index == netconfAll || v4 && w.outward[index]) && forwarding == 0 || index == w.index && filter != 2
}
