package podnet

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is the name of the nftables table of family netdev that holds the source checks: a chain for each pod, named as the
// host's end of its link, at that device's ingress.
const Table = "tulle-pods"

var (
	table    = &nftables.Table{Name: Table, Family: nftables.TableFamilyNetdev}
	priority = nftables.ChainPriorityRef(-500) // before whatever else looks at ingress
)

func (h *Host) nft() (*nftables.Conn, error) {
	var opts []nftables.ConnOption
	if h.ns != nil {
		opts = append(opts, nftables.WithNetNSFd(int(h.ns.Fd())))
	}
	c, err := nftables.New(opts...)
	if err != nil {
		return nil, fmt.Errorf("podnet: open an nftables netlink socket: %w (is the kernel module nf_tables there?)", err)
	}
	return c, nil
}

// installChecks makes a pod's chain as it should be, in one transaction: no packet meets half of it.
func (h *Host) installChecks(a *Attachment) error {
	device := a.HostInterface
	c, err := h.nft()
	if err != nil {
		return err
	}
	c.AddTable(table)
	for _, name := range reasons {
		c.AddObj(&nftables.NamedObj{Table: table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	accept := nftables.ChainPolicyAccept
	chain := c.AddChain(&nftables.Chain{
		Name: device, Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookIngress, Priority: priority,
		Policy: &accept, Device: device,
	})
	c.FlushChain(chain)
	for _, r := range podRules(a) {
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: r.exprs, UserData: r.comment()})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("podnet: source checks of %s: %w (is the kernel module nf_tables there?)", device, err)
	}
	return nil
}

// removeChecks removes a pod's chain if it is there.
func (h *Host) removeChecks(device string) error {
	c, err := h.nft()
	if err != nil {
		return err
	}
	chain := &nftables.Chain{Name: device, Table: table}
	c.DelChain(chain)
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("podnet: remove the source checks of %s: %w", device, err)
	}
	return nil
}

// RemoveAllChecks removes the table. The pods that are still wired are unchecked from then on.
func (h *Host) RemoveAllChecks() error {
	c, err := h.nft()
	if err != nil {
		return err
	}
	c.DelTable(table)
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("podnet: remove the nftables table netdev %s: %w", Table, err)
	}
	return nil
}

// chains lists the chains of the table by name; none if there is no table.
func chains(c *nftables.Conn) (map[string]*nftables.Chain, error) {
	list, err := c.ListChainsOfTableFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return nil, fmt.Errorf("podnet: list the chains of the nftables table netdev %s: %w", Table, err)
	}
	out := map[string]*nftables.Chain{}
	for _, ch := range list {
		if ch.Table.Name == Table {
			out[ch.Name] = ch
		}
	}
	return out, nil
}

// checked reads a pod's chain: whether it is as it should be, and what it has dropped.
func checked(c *nftables.Conn, chain *nftables.Chain, a *Attachment) (ok bool, dropped uint64, err error) {
	rules, err := c.GetRules(table, chain)
	if err != nil {
		return false, 0, fmt.Errorf("podnet: read the source checks of %s: %w", chain.Name, err)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if n, is := e.(*expr.Counter); is {
				dropped += n.Packets
			}
		}
	}
	same := func(have *nftables.Rule, want rule) bool { return string(have.UserData) == string(want.comment()) }
	return chain.Hooknum != nil && slices.EqualFunc(rules, podRules(a), same), dropped, nil
}

// List gives the pods of this host that are wired, by the name of the host's end.
func (h *Host) List() ([]Attachment, error) {
	c, err := h.nft()
	if err != nil {
		return nil, err
	}
	have, err := chains(c)
	if err != nil {
		return nil, err
	}
	pods, err := h.attachments()
	if err != nil {
		return nil, err
	}
	var out []Attachment
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		a := pods[name]
		if chain := have[name]; chain != nil {
			if _, a.Dropped, err = checked(c, chain, &a); err != nil && h.Exists(name) {
				return nil, err
			}
		}
		out = append(out, a)
	}
	return out, nil
}

// Drops counts the packets that the source checks of all pods have dropped, those that are gone too, by reason. They begin at
// 0 again after somebody has flushed the table.
func (h *Host) Drops() (map[string]uint64, error) {
	out := map[string]uint64{}
	for _, name := range reasons {
		out[name] = 0
	}
	c, err := h.nft()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return nil, fmt.Errorf("podnet: list the nftables tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == Table }) {
		return out, nil
	}
	objects, err := c.GetNamedObjects(table)
	if err != nil {
		return nil, fmt.Errorf("podnet: read the counters of the nftables table netdev %s: %w", Table, err)
	}
	for _, o := range objects {
		if n, ok := o.(*nftables.NamedObj); ok && n.Type == nftables.ObjTypeCounter {
			if count, ok := n.Obj.(*expr.Counter); ok {
				out[n.Name] = count.Packets
			}
		}
	}
	return out, nil
}
