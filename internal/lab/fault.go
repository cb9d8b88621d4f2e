package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// Faults of the network. They are made at the router's end of the hosts' links, where nothing of them shows on the hosts
// but that packets do not arrive.

const splitTable = "tulle-lab-split"

// Split cuts the network into groups of hosts that do not hear each other: what one group sends to another vanishes in
// silence. Hosts in no group form one of their own. An earlier Split is replaced.
func (l *Lab) Split(groups ...[]string) error {
	side := map[string]int{}
	for i, g := range groups {
		for _, name := range g {
			if _, err := l.Host(name); err != nil {
				return err
			}
			side[name] = i + 1
		}
	}
	return l.withSplitTable(func(c *nftables.Conn) error {
		table := c.AddTable(&nftables.Table{Name: splitTable, Family: nftables.TableFamilyNetdev})
		hosts := l.Hosts()
		for _, from := range hosts {
			// The ingress of the bridge's port comes before bridge and router: one place for both kinds of way.
			chain := c.AddChain(&nftables.Chain{
				Name: from.Name, Table: table, Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityFilter, Device: from.Name,
			})
			for _, to := range hosts {
				if side[from.Name] == side[to.Name] {
					continue
				}
				for _, a := range to.Underlay {
					c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: dropTo(a)})
				}
			}
		}
		return nil
	})
}

// Heal undoes Split.
func (l *Lab) Heal() error { return l.withSplitTable(func(*nftables.Conn) error { return nil }) }

// withSplitTable removes the table, has fn make it anew, and commits both at once.
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
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
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

// dropTo matches IP packets to one address: the network header's destination, at offset 16 (RFC 791) or 24 (RFC 8200).
func dropTo(a netip.Addr) []expr.Any {
	proto, offset := uint16(unix.ETH_P_IP), uint32(16)
	if a.Is6() {
		proto, offset = unix.ETH_P_IPV6, 24
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{byte(proto >> 8), byte(proto)}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(a.BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}

// Unplug pulls the cable of a host: its eth0 loses its carrier.
func (l *Lab) Unplug(host string) error { return l.port(host, (*sys.Netlink).LinkSetDown) }

// Plug puts the cable back. A host keeps its addresses and routes over that, as a real one does.
func (l *Lab) Plug(host string) error { return l.port(host, (*sys.Netlink).LinkSetUp) }

func (l *Lab) port(host string, set func(*sys.Netlink, netlink.Link) error) error {
	if _, err := l.Host(host); err != nil {
		return err
	}
	h, err := netlinkIn(sys.NetnsPath(l.netnsName(Router)))
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(host)
	if err != nil {
		return fmt.Errorf("find the port of %s: %w", host, err)
	}
	return set(h, link)
}

// removeVeth removes a pod's link.
func (l *Lab) removeVeth(host *Host, pod *Pod) error { return removeLink(host.Netns, pod.hostVeth()) }

// removePort removes a host's link.
func (l *Lab) removePort(host string) error {
	return removeLink(sys.NetnsPath(l.netnsName(Router)), host)
}

func removeLink(path, name string) error {
	h, err := netlinkIn(path)
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
	return h.LinkDel(link)
}
