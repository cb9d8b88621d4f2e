package seed

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Seed is one configured seed and what is known of it.
type Seed struct {
	Name string // as configured: HOST[:PORT]
	// Addrs are its addresses, IPv4 first, then in numerical order, each once: every host that gets the same answer sees the
	// same list. Those of the last lookup that found any, so that they outlive a name server.
	Addrs []netip.AddrPort
	Err   error     // why the last lookup found nothing; nil if it did, or before its end
	Since time.Time // of Err
	Tried bool      // the name was looked up once, for both families; always true for addresses
}

// Unresolved reports whether the seed has no address so far. It is not known then whether there is such a host.
func (s Seed) Unresolved() bool { return len(s.Addrs) == 0 }

// Why says in a few words why the seed has no address yet.
func (s Seed) Why() string {
	switch {
	case s.Err != nil && s.multicast() && notFound(s.Err):
		return Reason(s.Err) + "; a name in .local is one of mDNS, which the packaged program does not ask"
	case s.Err != nil:
		return Reason(s.Err)
	case s.Unresolved():
		return "its name server has not answered yet"
	}
	return ""
}

// multicast reports whether the name is one of mDNS (RFC 6762 §3).
func (s Seed) multicast() bool {
	host, _, _, err := parse(s.Name, 1)
	return err == nil && strings.HasSuffix(strings.ToLower(strings.TrimSuffix(host, ".")), ".local")
}

// ErrSyntax is in the errors about seeds that no name server can mend.
var ErrSyntax = errors.New("unusable seed")

// ErrUseless is in the errors about names whose addresses are of no use between hosts.
var ErrUseless = errors.New("no usable address")

// Reason is the error of a lookup in words for an operator. The same trouble has the same words each time.
func Reason(err error) string {
	dns, ok := errors.AsType[*net.DNSError](err)
	if !ok {
		return err.Error()
	}
	text := dns.Err
	if dns.IsTimeout {
		text = "the name server does not answer"
	} else if i := strings.LastIndex(text, ": "); i >= 0 { // before it, ports that differ each time
		text = text[i+2:]
	}
	if dns.Server != "" {
		text += " (name server " + dns.Server + ")"
	}
	return "its name does not resolve: " + text
}

// parse reads HOST[:PORT]; a bare IPv6 address needs no brackets. addr is invalid for a name.
func parse(text string, port uint16) (host string, addr netip.Addr, p uint16, err error) {
	if a, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		return text, a.Unmap(), port, nil
	}
	host = text
	if h, digits, err := net.SplitHostPort(text); err == nil {
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil || n == 0 {
			return "", netip.Addr{}, 0, fmt.Errorf("%w %q: port %q is not within 1–65535", ErrSyntax, text, digits)
		}
		host, port = h, uint16(n)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return host, a.Unmap(), port, nil
	}
	if host == "" || strings.Contains(host, ":") {
		return "", netip.Addr{}, 0, fmt.Errorf("%w %q: want HOST[:PORT]", ErrSyntax, text)
	}
	return host, netip.Addr{}, port, nil
}

// IsName reports whether a configured seed is a name, which may lead to another host later, and no address.
func IsName(text string) bool {
	_, addr, _, err := parse(text, 1)
	return err == nil && !addr.IsValid()
}

// maxAddrs bounds what one name may bring.
const maxAddrs = 64

// usable leaves out what no other host can be reached at, and reports what it was. Loopback addresses stay: by them a host knows
// its own name.
func usable(answer []netip.Addr) (good []netip.Addr, bad []string) {
	for _, a := range answer {
		a = a.Unmap()
		switch {
		case a.IsLinkLocalUnicast():
			bad = append(bad, a.String()+" is link-local")
		case !a.IsValid(), a.IsUnspecified(), a.IsMulticast():
			bad = append(bad, a.String()+" is not a host's address")
		default:
			good = append(good, a)
		}
	}
	slices.SortFunc(good, compare)
	good = slices.Compact(good)
	return good[:min(len(good), maxAddrs)], bad
}

// compare puts IPv4 first.
func compare(a, b netip.Addr) int {
	if a.Is4() != b.Is4() {
		if a.Is4() {
			return -1
		}
		return 1
	}
	return a.Compare(b)
}
