package podnet

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// The pod's next hops, the same for every pod.
var (
	Gateway4 = netip.MustParseAddr("169.254.1.1")
	Gateway6 = netip.MustParseAddr("fe80::1")
)

// HostMAC is the link-layer address of the host's end of every pod's link: a locally administered one.
var HostMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// Gateway is the pod's next hop for packets of a's family.
func Gateway(a netip.Addr) netip.Addr {
	if a.Is4() {
		return Gateway4
	}
	return Gateway6
}

// InterfaceName is the name of the host's end of the link for a pod interface with this ID. It follows from the ID alone, so
// that whoever knows the ID finds the link.
func InterfaceName(id string) string { return nameOf("tp", id) }

// Patterns, as of a shell, for the names of both ends of pods' links while they are in the host's namespace.
const (
	HostPattern = "tp????????????"
	PodPattern  = "tq????????????" // handed over: an engine moves it into the pod
)

// Made tells the devices of the host that Add has made: its ends of pods' links, and bridges.
func Made(l netlink.Link) bool {
	_, pod := attachmentOf(l)
	return pod || ours(l)
}

// nameOf makes a device's name: 14 bytes of the 15 that the kernel takes.
func nameOf(prefix, id string) string {
	sum := sha256.Sum256([]byte(id))
	return prefix + hex.EncodeToString(sum[:6])
}

// Config is one pod interface as it should be.
type Config struct {
	// ID names the interface on this host: the agent's allocation has the same (api.AllocateRequest).
	ID string
	// HostInterface is the name of the host's end; empty means InterfaceName(ID).
	HostInterface string
	// Netns is the path of the pod's network namespace. Empty hands the pod's end over: it stays in the host's namespace, down
	// and without addresses, for an engine that moves it into the pod by itself. Add returns its name.
	Netns string
	// Interface is the name in the pod.
	Interface string
	// Addresses, at most one of each family.
	Addresses []netip.Addr
	// MTU of both ends in bytes, from the agent.
	MTU int
	// GSOMaxSize and GSOMaxSegs bound the super-packets that the pod may send, in bytes and segments; 0 leaves the kernel's.
	GSOMaxSize, GSOMaxSegs int
	// MAC of the pod's end; nil lets the kernel choose, or behind a bridge derives it from the first address.
	MAC net.HardwareAddr
	// Bridge names the bridge of this host that the pod is behind; empty means a link of its own.
	Bridge string
	// OnLink are prefixes whose IPv4 addresses the pod looks for on the bridge. The host answers for those that are elsewhere; for
	// IPv6 no kernel does that, so there the host is the next hop of all packets.
	OnLink []netip.Prefix
	// Space is that of the cluster. The pod has routes to it besides its default routes: so other pods are reached whatever default routes and
	// larger networks the pod has from elsewhere.
	Space []netip.Prefix
}

// Bounds of an interface's MTU in bytes: RFC 791, RFC 8200 §5, and the kernel's for veth.
const (
	minMTU4 = 68
	minMTU6 = 1280
	maxMTU  = 65535
)

func (c Config) validate() (Config, error) {
	if c.ID == "" {
		return c, errors.New("podnet: the pod's interface has no ID")
	}
	if c.HostInterface == "" {
		c.HostInterface = InterfaceName(c.ID)
	}
	if err := CheckInterface(c.HostInterface); err != nil {
		return c, fmt.Errorf("podnet: %w", err)
	}
	if c.Netns != "" || c.Interface != "" {
		if err := CheckInterface(c.Interface); err != nil {
			return c, fmt.Errorf("podnet: %w", err)
		}
	}
	if c.Bridge != "" {
		if err := c.validateBridge(); err != nil {
			return c, err
		}
	}
	if len(c.Addresses) == 0 || len(c.Addresses) > 2 || len(c.Addresses) == 2 && c.Addresses[0].Is4() == c.Addresses[1].Is4() {
		return c, fmt.Errorf("podnet: addresses %v: want one, or one of each family", c.Addresses)
	}
	if c.Bridge != "" && c.MAC == nil {
		c.MAC = macOf(c.Addresses[0])
	}
	least := minMTU4
	for _, a := range c.Addresses {
		if !a.IsGlobalUnicast() || a.Is4In6() || a.Zone() != "" {
			return c, fmt.Errorf("podnet: %v cannot be a pod's address: want a plain unicast address", a)
		}
		if a.Is6() {
			least = minMTU6
		}
	}
	if n := len(aliasOf(&c)); n > maxAlias {
		return c, fmt.Errorf("podnet: ID %q is %d bytes too long to be kept in the link's alias", c.ID, n-maxAlias)
	}
	if c.MTU < least || c.MTU > maxMTU {
		return c, fmt.Errorf("podnet: MTU %d is outside %d–%d", c.MTU, least, maxMTU)
	}
	return c, nil
}

// CheckInterface holds the kernel's rules for a device's name (dev_valid_name), and so for a bridge's.
func CheckInterface(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ || name == "." || name == ".." || strings.ContainsAny(name, "/:% \t\n\v\f\r") {
		return fmt.Errorf("interface name %q: want 1 to %d bytes without \"/\", \":\", \"%%\" and spaces", name, unix.IFNAMSIZ-1)
	}
	return nil
}

// Attachment is a pod's interface as it is.
type Attachment struct {
	ID            string
	HostInterface string           // the host's end
	PodInterface  string           // the pod's end: in the pod, or in the host's namespace where it was handed over. Only Add knows it
	MAC           net.HardwareAddr // of the pod's end. Only Add knows it, but behind a bridge
	HostMAC       net.HardwareAddr // of the pod's next hop
	Bridge        string           // that the pod is behind; empty: none
	Addresses     []netip.Addr
	MTU           int
	Dropped       uint64 // packets that the source checks dropped
}

// Host is a network namespace that pods are wired to.
type Host struct {
	path string   // "": the process's own
	ns   *os.File // nil: the process's own
	nl   *sys.Netlink
}

// Open opens the host whose network namespace is at path; empty means the process's own, which needs no CAP_SYS_ADMIN for
// Reconcile, List and Drops. The caller Closes it.
func Open(path string) (*Host, error) {
	h := &Host{path: path}
	var err error
	if path == "" {
		h.nl, err = sys.NewNetlink(-1)
	} else if h.ns, err = sys.OpenNetns(path); err == nil {
		h.nl, err = sys.NewNetlink(int(h.ns.Fd()))
	}
	if err != nil {
		h.ns.Close()
		return nil, fmt.Errorf("podnet: the host: %w", err)
	}
	return h, nil
}

// Close releases the namespace.
func (h *Host) Close() error {
	h.nl.Close()
	if h.ns == nil {
		return nil
	}
	return h.ns.Close()
}

// do runs f on a thread that is in the host's namespace.
func (h *Host) do(f func() error) error {
	if h.ns == nil {
		return f()
	}
	return sys.WithNetnsFD(int(h.ns.Fd()), f)
}

// A link's alias: the mark; the addresses with commas between them, and behind a bridge "@", its name, "/", and the MAC of the
// pod's end; the ID. The kernel takes 255 bytes (IFALIASZ).
const (
	aliasMark = "tulle-pod"
	maxAlias  = 255
)

func aliasOf(c *Config) string {
	texts := make([]string, len(c.Addresses))
	for i, a := range c.Addresses {
		texts[i] = a.String()
	}
	list := strings.Join(texts, ",")
	if c.Bridge != "" {
		list += "@" + c.Bridge + "/" + c.MAC.String()
	}
	return aliasMark + " " + list + " " + c.ID
}

// parseAlias reads what aliasOf wrote. Others' aliases, and damaged ones, are not ours.
func parseAlias(s string) (a Attachment, ours bool) {
	rest, ours := strings.CutPrefix(s, aliasMark+" ")
	list, id, ok := strings.Cut(rest, " ")
	if !ours || !ok || id == "" {
		return Attachment{}, false
	}
	a.ID = id
	list, port, behind := strings.Cut(list, "@")
	if behind {
		bridge, mac, _ := strings.Cut(port, "/")
		m, err := net.ParseMAC(mac)
		if err != nil || len(m) != len(HostMAC) || CheckInterface(bridge) != nil {
			return Attachment{}, false
		}
		a.Bridge, a.MAC = bridge, m
	}
	for text := range strings.SplitSeq(list, ",") {
		addr, err := netip.ParseAddr(text)
		if err != nil {
			return Attachment{}, false
		}
		a.Addresses = append(a.Addresses, addr)
	}
	return a, true
}

// attachments lists the links that carry our mark, by the name of the host's end.
func (h *Host) attachments() (map[string]Attachment, error) {
	links, err := h.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("podnet: list devices: %w", err)
	}
	out := map[string]Attachment{}
	for _, l := range links {
		if a, ours := attachmentOf(l); ours {
			out[a.HostInterface] = a
		}
	}
	return out, nil
}

func attachmentOf(l netlink.Link) (Attachment, bool) {
	at := l.Attrs()
	a, ours := parseAlias(at.Alias)
	if !ours || l.Type() != "veth" {
		return Attachment{}, false
	}
	a.HostInterface, a.HostMAC, a.MTU = at.Name, HostMAC, at.MTU
	return a, true
}
