package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Network faults. They are made at the router's end of the hosts' links. The hosts notice only that packets do not arrive, or
// that the link has no carrier.

const splitTable = "tulle-lab-split"

// Split partitions the network into groups of hosts. Packets between groups are dropped silently, whether they are bridged or
// routed. Hosts that are in no group form one more group. Split replaces an earlier Split.
//
// A packet is marked with its sender's group when it arrives from the sender's port, and dropped when it would leave through
// the port of a host in another group. Packets of the router itself (mark 0) reach all hosts.
func (l *Lab) Split(groups ...[]string) error {
	if err := l.errStraight(); err != nil {
		return err
	}
	group := map[string]uint32{}
	for i, g := range groups {
		for _, name := range g {
			if _, err := l.Host(name); err != nil {
				return err
			}
			group[name] = uint32(i + 2)
		}
	}
	return l.withSplitTable(func(c *nftables.Conn) error {
		table := c.AddTable(&nftables.Table{Name: splitTable, Family: nftables.TableFamilyBridge})
		in := c.AddChain(&nftables.Chain{
			Name: "in", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityFilter,
		})
		out := c.AddChain(&nftables.Chain{
			Name: "out", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityFilter,
		})
		for _, h := range l.Hosts() {
			mark := binary.NativeEndian.AppendUint32(nil, max(group[h.Name], 1))
			c.AddRule(&nftables.Rule{Table: table, Chain: in, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(h.Name)},
				&expr.Immediate{Register: 1, Data: mark},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
			}})
			c.AddRule(&nftables.Rule{Table: table, Chain: out, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ifname(h.Name)},
				&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
				&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: mark},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}})
		}
		return nil
	})
}

// ifname is an interface's name as nftables compares it.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// Heal undoes Split.
func (l *Lab) Heal() error { return l.withSplitTable(func(*nftables.Conn) error { return nil }) }

// withSplitTable removes the table and lets fn create it again, in one transaction.
func (l *Lab) withSplitTable(fn func(*nftables.Conn) error) error {
	ns, err := os.Open(sys.NetnsPath(l.netnsName(Router)))
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close()
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	defer c.CloseLasting()
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyBridge)
	if err != nil {
		return fmt.Errorf("list nft tables: %w", err)
	}
	if i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == splitTable }); i >= 0 {
		c.DelTable(tables[i])
	}
	if err := fn(c); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("split the network: %w", err)
	}
	return nil
}

// Unplug disconnects a host: its eth0 loses carrier.
func (l *Lab) Unplug(host string) error { return l.port(host, (*sys.Netlink).LinkSetDown) }

// Plug reconnects a host. The host keeps its addresses and routes meanwhile, as a real one does.
func (l *Lab) Plug(host string) error { return l.port(host, (*sys.Netlink).LinkSetUp) }

func (l *Lab) port(host string, set func(*sys.Netlink, netlink.Link) error) error {
	at, err := l.Host(host)
	if err != nil {
		return err
	}
	h, err := sys.OpenNetlink(sys.NetnsPath(l.netnsName(Router)))
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(l.portName(&at))
	if err != nil {
		return fmt.Errorf("find the port of %s: %w", host, err)
	}
	return set(h, link)
}

// removePort removes a host's link.
func (l *Lab) removePort(host string) error {
	return removeLink(sys.NetnsPath(l.netnsName(Router)), host)
}

func removeLink(path, name string) error {
	h, err := sys.OpenNetlink(path)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	} else if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) { // it goes with its peer, whose namespace went
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}
