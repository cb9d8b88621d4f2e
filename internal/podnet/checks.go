package podnet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
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
		return nil, fmt.Errorf("podnet: open an nftables netlink socket: %w", err)
	}
	return c, nil
}

// installChecks makes a pod's chain as it should be, in one transaction: no packet meets half of it.
func (h *Host) installChecks(device string, addrs []netip.Addr) error {
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
	for _, r := range podRules(addrs) {
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
func checked(c *nftables.Conn, chain *nftables.Chain, addrs []netip.Addr) (ok bool, dropped uint64, err error) {
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
	return chain.Hooknum != nil && slices.EqualFunc(rules, podRules(addrs), same), dropped, nil
}

// Reconcile puts back what somebody has taken from the pods of this host: source checks and routes. It removes checks of
// pods that are gone. It returns a line for each thing mended.
func (h *Host) Reconcile(ctx context.Context) (repaired []string, err error) {
	c, err := h.nft()
	if err != nil {
		return nil, err
	}
	// The chains first: a link is made before its chain, so that a chain without a link has lost it.
	have, err := chains(c)
	if err != nil {
		return nil, err
	}
	pods, err := h.attachments()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		if ctx.Err() != nil {
			return repaired, errors.Join(errs...)
		}
		a := pods[name]
		did, err := h.mend(ctx, c, &a, have[name])
		repaired = append(repaired, did...)
		errs = append(errs, err)
	}
	for name := range have {
		if _, ok := pods[name]; !ok && !h.Exists(name) {
			errs = append(errs, h.removeChecks(name))
		}
	}
	return repaired, errors.Join(errs...)
}

// mend looks after one pod. Its link may vanish at any moment.
func (h *Host) mend(ctx context.Context, c *nftables.Conn, a *Attachment, chain *nftables.Chain) (repaired []string, err error) {
	ok := false
	if chain != nil {
		if ok, _, err = checked(c, chain, a.Addresses); err != nil {
			ok = false // it was changed while it was read
		}
	}
	if !ok {
		if err := h.installChecks(a.HostInterface, a.Addresses); err != nil {
			return nil, h.unlessGone(a.HostInterface, err)
		}
		repaired = append(repaired, fmt.Sprintf("source checks of %s (%s)", a.HostInterface, a.ID))
	}
	link, err := h.nl.LinkByName(a.HostInterface)
	if err != nil {
		return repaired, h.unlessGone(a.HostInterface, err)
	}
	if link.Attrs().RawFlags&unix.IFF_UP == 0 {
		return repaired, nil // it is being made
	}
	whole := true
	for _, addr := range a.Addresses {
		yes, err := hasRoute(h.nl, link, sys.HostPrefix(addr).String())
		if err != nil {
			return repaired, h.unlessGone(a.HostInterface, err)
		}
		whole = whole && yes
	}
	if whole {
		return repaired, nil
	}
	if err := h.hostAddresses(ctx, link, a); err != nil {
		return repaired, h.unlessGone(a.HostInterface, err)
	}
	return append(repaired, fmt.Sprintf("routes to %v by %s (%s)", a.Addresses, a.HostInterface, a.ID)), nil
}

// Exists reports whether the host has a device of this name.
func (h *Host) Exists(device string) bool {
	_, err := h.nl.LinkByName(device)
	return err == nil
}

// unlessGone is err, or nil if the device has gone meanwhile.
func (h *Host) unlessGone(device string, err error) error {
	if !h.Exists(device) {
		return nil
	}
	return err
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
			if _, a.Dropped, err = checked(c, chain, a.Addresses); err != nil && h.Exists(name) {
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
