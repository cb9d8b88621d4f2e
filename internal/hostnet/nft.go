package hostnet

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	nl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftConn is the one netlink socket to nf_tables, with its port number, by which Watch
// knows our own changes.
type nftConn struct {
	conn *nftables.Conn // used under Reconciler.mu
	port atomic.Uint32
}

// Buffers of the socket in bytes: a table for 1,000 members goes in one batch.
const nftBuffer = 4 << 20

func openNFT() (*nftConn, error) {
	c := &nftConn{}
	return c, c.open()
}

// open must run inside the namespace.
func (c *nftConn) open() error {
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(s *nl.Conn) error {
		// Best effort: without CAP_NET_ADMIN the limit of net.core holds.
		_ = s.SetReadBuffer(nftBuffer)
		_ = s.SetWriteBuffer(nftBuffer)
		port, err := portOf(s)
		c.port.Store(port)
		return err
	}))
	if err != nil {
		return fmt.Errorf("hostnet: open an nftables netlink socket: %w (is the kernel module nf_tables there?)", err)
	}
	c.conn = conn
	return nil
}

// reopen exchanges the socket after an error: a batch begun, or answers not yet read, would
// spoil whatever came next. It gives the error back.
func (c *nftConn) reopen(ns *namespace, err error) error {
	_ = c.close()
	return errors.Join(err, ns.do(c.open))
}

// portOf is a netlink socket's port number (netlink(7), nl_pid).
func portOf(s *nl.Conn) (uint32, error) {
	raw, err := s.SyscallConn()
	if err != nil {
		return 0, err
	}
	var port uint32
	var inner error
	err = raw.Control(func(fd uintptr) {
		sa, err := unix.Getsockname(int(fd))
		if a, ok := sa.(*unix.SockaddrNetlink); ok {
			port = a.Pid
		}
		inner = err
	})
	return port, errors.Join(err, inner)
}

func (c *nftConn) close() error {
	if c == nil || c.conn == nil {
		return nil
	}
	return c.conn.CloseLasting()
}

var ourTable = &nftables.Table{Name: Table, Family: nftables.TableFamilyINet}

// nftTable is the table as it should be.
type nftTable struct {
	chains []nftChain
	sets   []nftSet
}

type nftChain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []nftRule
}

type nftSet struct {
	name     string
	key      nftables.SetDatatype
	interval bool
	counted  bool // its elements have counters; unknown of a set that was read
	elements []nftables.SetElement
}

// reconcileNFT compares the table with what it should be. Rules carry a digest of
// themselves in their comment, so equal rules are left alone, with their counters.
// Differing elements are exchanged in one transaction, anything else makes the whole table
// anew, in one transaction too: no packet ever meets half a table.
func (p *pass) reconcileNFT() error {
	if err := p.reconcileTable(); err != nil {
		return p.r.nft.reopen(p.r.ns, err)
	}
	return nil
}

func (p *pass) reconcileTable() error {
	named, err := p.namedSources()
	if err != nil {
		return err
	}
	want, err := buildTable(p.s, named)
	if err != nil {
		return err
	}
	c := p.r.nft
	have, err := c.read()
	if err != nil {
		return fmt.Errorf("hostnet: read the nftables table inet %s: %w (is the kernel module nf_tables there?)", Table, err)
	}
	p.r.counts.want(want)
	object := "nft table inet " + Table
	is := object + " " + want.digest()
	if have == nil || !have.sameShape(want) {
		if err := c.write(want, have != nil); err != nil {
			return fmt.Errorf("hostnet: write the nftables table inet %s: %w", Table, err)
		}
		p.r.counts.ended(have, nil)
		was := ""
		if have != nil {
			was = "another content"
		}
		p.put(object, was, is)
		for _, s := range want.sets {
			p.keep(object+" set "+s.name, s.text())
		}
		return nil
	}
	p.keep(object, is)
	changed := false
	for i, s := range want.sets {
		if slices.EqualFunc(have.sets[i].elements, s.elements, sameElement) {
			p.keep(object+" set "+s.name, s.text())
			continue
		}
		changed = true
		if err := c.exchange(have.sets[i], s); err != nil {
			return fmt.Errorf("hostnet: change the nftables set %s: %w", s.name, err)
		}
	}
	if !changed {
		return nil
	}
	if err := c.conn.Flush(); err != nil {
		return fmt.Errorf("hostnet: change the sets of nftables table inet %s: %w", Table, err)
	}
	p.r.counts.ended(have, want)
	for i, s := range want.sets {
		if !slices.EqualFunc(have.sets[i].elements, s.elements, sameElement) {
			p.put(object+" set "+s.name, have.sets[i].text(), s.text())
		}
	}
	return nil
}

// LeftMembers returns the members' underlay addresses in the nftables table that an earlier run left in the calling thread's network
// namespace.
func LeftMembers() (out []netip.Addr, err error) {
	c, err := openNFT()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	t, err := c.read()
	if err != nil {
		return nil, fmt.Errorf("hostnet: read the nftables table inet %s: %w (is the kernel module nf_tables there?)", Table, err)
	}
	if t == nil {
		return nil, nil
	}
	for _, s := range t.sets {
		if s.name != setMembers+"4" && s.name != setMembers+"6" {
			continue
		}
		for _, e := range s.elements {
			if a, ok := netip.AddrFromSlice(e.Key); ok {
				out = append(out, a)
			}
		}
	}
	return out, nil
}

// read gives the table as it is; nil when there is none.
func (c *nftConn) read() (*nftTable, error) {
	// A change in between shows as a missing object: ask again, a few times. The library
	// does not wrap errors here, so all of them are treated alike.
	const attempts = 5
	var t *nftTable
	var err error
	for range attempts {
		if t, err = c.readOnce(); err == nil {
			break
		}
	}
	return t, err
}

func (c *nftConn) readOnce() (*nftTable, error) {
	tables, err := c.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == Table }) {
		return nil, nil
	}
	t := &nftTable{}
	chains, err := c.conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, err
	}
	for _, ch := range chains {
		if ch.Table.Name != Table {
			continue
		}
		rules, err := c.conn.GetRules(ourTable, ch)
		if err != nil {
			return nil, err
		}
		n := nftChain{name: ch.Name, kind: ch.Type, hook: ch.Hooknum, priority: ch.Priority}
		if ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
			n.kind += " drop" // never ours
		}
		for _, r := range rules {
			n.rules = append(n.rules, nftRule{comment: r.UserData, exprs: r.Exprs})
		}
		t.chains = append(t.chains, n)
	}
	sets, err := c.conn.GetSets(ourTable)
	if err != nil {
		return nil, err
	}
	for _, s := range sets {
		if s.Anonymous {
			continue
		}
		elements, err := c.conn.GetSetElements(s)
		if err != nil {
			return nil, err
		}
		t.sets = append(t.sets, nftSet{name: s.Name, key: s.KeyType, interval: s.Interval, elements: elements})
	}
	t.sort()
	return t, nil
}

func (t *nftTable) sort() {
	slices.SortFunc(t.chains, func(a, b nftChain) int { return cmp.Compare(a.name, b.name) })
	slices.SortFunc(t.sets, func(a, b nftSet) int { return cmp.Compare(a.name, b.name) })
	for _, s := range t.sets {
		sortElements(s.elements)
	}
}

func sortElements(all []nftables.SetElement) {
	slices.SortFunc(all, func(a, b nftables.SetElement) int {
		// An interval's end may be the next one's start.
		return cmp.Or(bytes.Compare(a.Key, b.Key), cmp.Compare(flag(b.IntervalEnd), flag(a.IntervalEnd)))
	})
}

func flag(b bool) int {
	if b {
		return 1
	}
	return 0
}

func sameElement(a, b nftables.SetElement) bool {
	return a.IntervalEnd == b.IntervalEnd && bytes.Equal(a.Key, b.Key)
}

// sameShape reports whether all but the sets' elements is equal.
func (t *nftTable) sameShape(want *nftTable) bool {
	sameRule := func(a, b nftRule) bool { return bytes.Equal(a.comment, b.comment) }
	return slices.EqualFunc(t.chains, want.chains, func(a, b nftChain) bool {
		return a.name == b.name && a.kind == b.kind && a.hook != nil && *a.hook == *b.hook &&
			a.priority != nil && *a.priority == *b.priority && slices.EqualFunc(a.rules, b.rules, sameRule)
	}) && slices.EqualFunc(t.sets, want.sets, func(a, b nftSet) bool {
		return a.name == b.name && a.key.Name == b.key.Name && a.interval == b.interval
	})
}

// digest is a short name of the table's shape, for reports.
func (t *nftTable) digest() string {
	h := sha256.New()
	for _, c := range t.chains {
		fmt.Fprintf(h, "%s %s %d %d\n", c.name, c.kind, *c.hook, *c.priority)
		for _, r := range c.rules {
			h.Write(r.comment)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:4])
}

func (s *nftSet) text() string {
	h := sha256.New()
	n := 0
	for _, e := range s.elements {
		h.Write(e.Key)
		if !e.IntervalEnd {
			n++
		}
	}
	return fmt.Sprintf("nft set %s, %d elements %x", s.name, n, h.Sum(nil)[:4])
}

// write makes the table, in place of the old one if there is one.
func (c *nftConn) write(t *nftTable, replace bool) error {
	if replace {
		c.conn.DelTable(ourTable)
	}
	c.conn.AddTable(ourTable)
	accept := nftables.ChainPolicyAccept
	for i, s := range t.sets {
		set := s.object()
		set.ID = uint32(i + 1)
		if err := c.conn.AddSet(set, nil); err != nil {
			return err
		}
		if err := c.elements(c.conn.SetAddElements, set, s.elements); err != nil {
			return err
		}
	}
	for _, ch := range t.chains {
		chain := c.conn.AddChain(&nftables.Chain{Name: ch.name, Table: ourTable, Type: ch.kind, Hooknum: ch.hook, Priority: ch.priority, Policy: &accept})
		for _, r := range ch.rules {
			c.conn.AddRule(&nftables.Rule{Table: ourTable, Chain: chain, Exprs: r.exprs, UserData: r.comment})
		}
	}
	return c.conn.Flush()
}

// exchange puts the commands into the batch that make have's elements want's.
func (c *nftConn) exchange(have, want nftSet) error {
	set := want.object()
	if want.counted { // what stays keeps its counters
		if err := c.elements(c.conn.SetDeleteElements, set, otherIntervals(have.elements, want.elements)); err != nil {
			return err
		}
		return c.elements(c.conn.SetAddElements, set, otherIntervals(want.elements, have.elements))
	}
	if want.interval {
		// Neighbouring intervals share keys: exchanged as a whole. They are few.
		c.conn.FlushSet(set)
		return c.elements(c.conn.SetAddElements, set, want.elements)
	}
	gone := difference(have.elements, want.elements)
	if err := c.elements(c.conn.SetDeleteElements, set, gone); err != nil {
		return err
	}
	return c.elements(c.conn.SetAddElements, set, difference(want.elements, have.elements))
}

// difference gives the elements of a that are not in b.
func difference(a, b []nftables.SetElement) []nftables.SetElement {
	in := make(map[string]bool, len(b))
	for _, e := range b {
		in[string(e.Key)] = true
	}
	var out []nftables.SetElement
	for _, e := range a {
		if !in[string(e.Key)] {
			out = append(out, e)
		}
	}
	return out
}

// chunk is how many elements go in one message: their attribute's length has 16 bits.
const chunk = 500

func (c *nftConn) elements(put func(*nftables.Set, []nftables.SetElement) error, set *nftables.Set, all []nftables.SetElement) error {
	for part := range slices.Chunk(all, chunk) {
		if err := put(set, part); err != nil {
			return err
		}
	}
	return nil
}

func (s *nftSet) object() *nftables.Set {
	return &nftables.Set{Table: ourTable, Name: s.name, KeyType: s.key, Interval: s.interval, Counter: s.counted}
}

// remove deletes the table if it is there.
func (c *nftConn) remove() error {
	tables, err := c.conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("hostnet: list the nftables tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == Table }) {
		return nil
	}
	c.conn.DelTable(ourTable)
	if err := c.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("hostnet: delete the nftables table inet %s: %w", Table, err)
	}
	return nil
}

// comment is a rule's user data as nft shows it, bound to the rule's content.
func comment(text string, content []byte) []byte {
	sum := sha256.Sum256(content)
	return userdata.AppendString(nil, userdata.TypeComment, fmt.Sprintf("tulle: %s (%x)", text, sum[:4]))
}

// intervals are the elements of an interval set that holds the prefixes of one family: each
// run of touching ones as its first address and, marked as an end, the one after its last.
func intervals(prefixes []netip.Prefix, v4 bool) []nftables.SetElement {
	type span struct{ first, last netip.Addr }
	var spans []span
	for _, p := range prefixes { // sorted by address
		if p.Addr().Is4() != v4 {
			continue
		}
		s := span{p.Addr(), lastAddr(p)}
		if n := len(spans); n > 0 {
			if prev := &spans[n-1]; !prev.last.Less(s.first) || prev.last.Next() == s.first {
				if prev.last.Less(s.last) {
					prev.last = s.last
				}
				continue
			}
		}
		spans = append(spans, s)
	}
	var out []nftables.SetElement
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: s.first.AsSlice()})
		if after := s.last.Next(); after.IsValid() {
			out = append(out, nftables.SetElement{Key: after.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
