package podnet

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
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

// checked judges a pod's chain by its rules: whether it is as it should be, and what it has dropped.
func checked(chain *nftables.Chain, rules []chainRule, a *Attachment) (ok bool, dropped uint64) {
	for _, r := range rules {
		dropped += r.packets
	}
	same := func(have chainRule, want rule) bool { return have.comment == string(want.comment()) }
	return chain.Hooknum != nil && slices.EqualFunc(rules, podRules(a), same), dropped
}

// List gives the pods of this host that are wired, by the name of the host's end, and without what the source checks have dropped.
func (h *Host) List() ([]Attachment, error) {
	pods, err := h.attachments()
	if err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Values(pods), func(a, b Attachment) int { return strings.Compare(a.HostInterface, b.HostInterface) }), nil
}

// ListDropped is List with what the source checks have dropped.
func (h *Host) ListDropped() ([]Attachment, error) {
	rules, err := h.readRules("")
	if err != nil {
		return nil, err
	}
	out, err := h.List()
	for i := range out {
		for _, r := range rules[out[i].HostInterface] {
			out[i].Dropped += r.packets
		}
	}
	return out, err
}

// Get gives the pod with this ID, with what the source checks have dropped; ok is false if it is not wired.
func (h *Host) Get(id string) (a Attachment, ok bool, err error) {
	name := InterfaceName(id)
	link, err := h.nl.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return a, false, nil
	} else if err != nil {
		return a, false, fmt.Errorf("podnet: find %s: %w", name, err)
	}
	if a, ok = attachmentOf(link); !ok || a.ID != id {
		return Attachment{}, false, nil
	}
	rules, err := h.readRules(name)
	for _, r := range rules[name] {
		a.Dropped += r.packets
	}
	return a, err == nil, err
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
