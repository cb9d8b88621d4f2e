package config

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// The readers of single values. Their errors begin with the value; the caller puts the place in front.

// Modes are the names of the encapsulations.
var Modes = []string{"direct", "udp", "ipip", "vxlan"}

// reserved space can never be pods': what it is for is part of the error.
var reserved = []struct {
	prefix netip.Prefix
	use    string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network, RFC 791"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("240.0.0.0/4"), "reserved, RFC 1112"},
	{netip.MustParsePrefix("::/96"), "unspecified, loopback and IPv4-compatible"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4-mapped"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("fec0::/10"), "site-local, deprecated"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

var nodeNameRule = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)

func parseNodeName(s string) (string, error) {
	if s != "" {
		if !nodeNameRule.MatchString(s) {
			return "", fmt.Errorf("%q: want letters, digits, \"-\", \"_\", \".\", at most 63, a letter or digit at both ends", s)
		}
		return s, nil
	}
	host, err := os.Hostname()
	if err != nil || !nodeNameRule.MatchString(host) {
		return "", fmt.Errorf("is not set and the host's name %q cannot be used (letters, digits, \"-\", \"_\", \".\", at most 63); set --node-name", host)
	}
	return host, nil
}

// parseJoin reads HOST[:PORT] and gives HOST:PORT.
func parseJoin(s string, port uint16) (string, error) {
	host, portText := s, strconv.Itoa(int(port))
	const remedy = "want HOST or HOST:PORT, IPv6 as [ADDRESS] or [ADDRESS]:PORT"
	switch {
	case strings.HasPrefix(s, "["):
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", fmt.Errorf("%q: the bracket is not closed; %s", s, remedy)
		}
		host = s[1:end]
		if a, err := netip.ParseAddr(host); err != nil || !a.Is6() {
			return "", fmt.Errorf("%q: %q is not an IPv6 address; %s", s, host, remedy)
		}
		if rest := s[end+1:]; rest != "" {
			var ok bool
			if portText, ok = strings.CutPrefix(rest, ":"); !ok {
				return "", fmt.Errorf("%q: %q after the bracket; %s", s, rest, remedy)
			}
		}
	case strings.Count(s, ":") > 1:
		return "", fmt.Errorf("%q: an IPv6 address needs brackets, else its port cannot be told; write %s (with quotes in the file)", s, bracketed(s))
	case strings.Contains(s, ":"):
		host, portText, _ = strings.Cut(s, ":")
	}
	if _, err := parsePort(portText); err != nil {
		return "", fmt.Errorf("%q: port %w", s, err)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		if a.IsUnspecified() || a.IsMulticast() {
			return "", fmt.Errorf("%q: %s is no host's address; %s", s, host, remedy)
		}
	} else if !hostRule.MatchString(host) {
		return "", fmt.Errorf("%q: %q is neither a host name nor an address; %s", s, host, remedy)
	}
	return net.JoinHostPort(host, portText), nil
}

// bracketed is how an IPv6 address without brackets was probably meant.
func bracketed(s string) string {
	whole := `"[` + s + `]"`
	i := strings.LastIndexByte(s, ':')
	_, portErr := parsePort(s[i+1:])
	if a, err := netip.ParseAddr(s[:i]); err != nil || !a.Is6() || portErr != nil {
		return whole
	}
	withPort := `"[` + s[:i] + "]" + s[i:] + `"`
	if _, err := netip.ParseAddr(s); err != nil {
		return withPort
	}
	return withPort + " if " + s[i+1:] + " is the port, or " + whole
}

var hostRule = regexp.MustCompile(`^([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.?$`)

// parsePrefixes reads at most one prefix of each family.
func parsePrefixes(v []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range v {
		p, err := netip.ParsePrefix(s)
		if err != nil || p.Addr().Is4In6() {
			return nil, fmt.Errorf("%q: not a prefix such as 10.244.0.0/16 or fd00:244::/48", s)
		}
		if m := p.Masked(); m != p {
			return nil, fmt.Errorf("%s: has bits set behind its length; write %s", s, m)
		}
		for _, r := range reserved {
			if r.prefix.Overlaps(p) {
				return nil, fmt.Errorf("%s: overlaps %s (%s); choose private space such as 10.244.0.0/16 or a prefix in fd00::/8", s, r.prefix, r.use)
			}
		}
		for _, o := range out {
			if o.Addr().Is4() == p.Addr().Is4() {
				return nil, fmt.Errorf("%s: %s is given too; one prefix a family", s, o)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

// parseNoMasquerade reads networks outside the cluster, sorted, each once.
func parseNoMasquerade(v []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range v {
		p, err := netip.ParsePrefix(s)
		switch {
		case err != nil || p.Addr().Is4In6():
			return nil, fmt.Errorf("%q: not a prefix such as 198.51.100.0/24, or 192.0.2.7/32 for one host", s)
		case p.Masked() != p:
			return nil, fmt.Errorf("%s: has bits set behind its length; write %s", s, p.Masked())
		case p.Bits() == 0:
			return nil, fmt.Errorf("%s: is every destination; to masquerade nothing, set masquerade to false", s)
		}
		out = append(out, p)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out), nil
}

// Limits of a block's length. Its first address is the node's own, so a block of one address would serve no pod.
const (
	defaultLen4, maxLen4 = 24, 30
	defaultLen6, maxLen6 = 64, 126
)

func parseLens(v []string) (len4, len6 int, err error) {
	len4, len6 = defaultLen4, defaultLen6
	if len(v) == 0 || len(v) > 2 {
		return 0, 0, fmt.Errorf("%q: want one length, or one for IPv4 and one for IPv6, such as 24,64", strings.Join(v, ","))
	}
	for i, s := range v {
		n, err := strconv.Atoi(s)
		four := i == 0 && (len(v) == 2 || n <= 32)
		limit, family, to := maxLen6, "IPv6", &len6
		if four {
			limit, family, to = maxLen4, "IPv4", &len4
		}
		if err != nil || n < 1 || n > limit {
			return 0, 0, fmt.Errorf("%q: want a length from 1 to %d for %s", s, limit, family)
		}
		*to = n
	}
	return len4, len6, nil
}

// askedLens is what parseLens has read, without the defaults.
func askedLens(v []string) (len4, len6 int) {
	len4, len6, _ = parseLens(v)
	switch n, _ := strconv.Atoi(v[0]); {
	case len(v) == 2:
		return len4, len6
	case n <= 32:
		return len4, 0
	}
	return 0, len6
}

func parseUnderlay(v []string) (Underlay, error) {
	var u Underlay
	for _, s := range v {
		if a, err := netip.ParseAddr(s); err == nil {
			if a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a.Zone() != "" {
				return u, fmt.Errorf("%s: not an address that a host can have", s)
			}
			if slices.ContainsFunc(u.Addresses, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
				return u, fmt.Errorf("%s: at most one address a family (%s is given too)", s, join(u.Addresses))
			}
			u.Addresses = append(u.Addresses, a)
			continue
		}
		if checkIfname(s, maxAltname) != nil {
			return u, fmt.Errorf("%q: neither an address nor the name of an interface", s)
		}
		u.Interface = s
	}
	if u.Interface != "" && len(v) > 1 {
		return u, fmt.Errorf("%s: want one interface, or addresses", strings.Join(v, ","))
	}
	return u, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q: want a port from 1 to 65535", s)
	}
	return uint16(n), nil
}

func parseVNI(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 24)
	if err != nil {
		return 0, fmt.Errorf("%q: want a number from 0 to %d", s, 1<<24-1)
	}
	return uint32(n), nil
}

func parseMAC(s string) (mac [6]byte, err error) {
	if s == "" {
		return mac, nil
	}
	b, err := net.ParseMAC(s)
	if err != nil || len(b) != len(mac) || b[0]&1 != 0 || slices.Max(b) == 0 {
		return mac, fmt.Errorf("%q: want the MAC address of one station, such as 02:00:5e:10:00:01", s)
	}
	return [6]byte(b), nil
}

func showMAC(mac [6]byte) string {
	if mac == [6]byte{} {
		return ""
	}
	return net.HardwareAddr(mac[:]).String()
}

func parsePaths(v []string) ([]string, error) {
	var out []string
	for _, s := range v {
		if !slices.Contains(Modes, s) {
			return nil, fmt.Errorf("%q: want some of %s, in order of preference", s, strings.Join(Modes, ", "))
		}
		if slices.Contains(out, s) {
			return nil, fmt.Errorf("%q: named twice", s)
		}
		out = append(out, s)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("is empty: want some of %s, in order of preference", strings.Join(Modes, ", "))
	}
	return out, nil
}

// Lengths of interfaces' names in bytes: IFNAMSIZ and ALTIFNAMSIZ, less the zero at the end.
const (
	maxIfname  = 15
	maxAltname = 127
)

// CheckInterface says why s cannot be the name of an interface.
func CheckInterface(s string) error { return checkIfname(s, maxIfname) }

// parseIfname takes the name of an interface.
func parseIfname(s string) (string, error) { return s, CheckInterface(s) }

// parseBridge takes the name of a bridge, or nothing.
func parseBridge(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	return parseIfname(s)
}

// checkIfname holds the kernel's rules (dev_valid_name) and refuses "%", which the kernel would fill in with a number.
func checkIfname(s string, most int) error {
	if s == "" || len(s) > most || s == "." || s == ".." || strings.ContainsAny(s, "/:% \t\n\v\f\r") {
		return fmt.Errorf("%q: want the name of an interface: 1 to %d bytes without \"/\", \":\", \"%%\" and spaces", s, most)
	}
	return nil
}

const (
	minMTU4 = 576  // RFC 791: what every host takes
	minMTU6 = 1280 // RFC 8200 §5
	maxMTU  = 65535
)

func parseMTU(s string) (int, error) {
	if s == "auto" {
		return 0, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < minMTU4 || n > maxMTU {
		return 0, fmt.Errorf("%q: want %d to %d, or auto", s, minMTU4, maxMTU)
	}
	return n, nil
}

// MaxQueues bounds --queues: each queue costs a few MB of buffers, and five of the descriptors that systemd keeps.
const MaxQueues = 64

func parseBenchMbps(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > maxBenchMbps {
		return 0, fmt.Errorf("%q: want 0 (refuse benchmarks) to %d", s, maxBenchMbps)
	}
	return n, nil
}

// maxBenchMbps is the largest bench_mbps: no link of a host carries more.
const maxBenchMbps = 100_000

func parseQueues(s string) (int, error) {
	if s == "auto" {
		return 0, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > MaxQueues {
		return 0, fmt.Errorf("%q: want 1 to %d, or auto", s, MaxQueues)
	}
	return n, nil
}

// showAuto shows a number that is chosen at run time if it is 0.
func showAuto(n int) string {
	if n == 0 {
		return "auto"
	}
	return strconv.Itoa(n)
}

func parseBool(s string) (bool, error) {
	switch s {
	case "true", "yes", "on":
		return true, nil
	case "false", "no", "off":
		return false, nil
	}
	return false, fmt.Errorf("%q: want true or false", s)
}

// parsePath reads an absolute path, or nothing. Relative ones would depend on where the agent was started.
func parsePath(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if !filepath.IsAbs(s) || strings.ContainsRune(s, 0) {
		return "", fmt.Errorf("%q: want an absolute path", s)
	}
	return filepath.Clean(s), nil
}

func parseMetrics(s string) (string, error) {
	if s == "off" {
		return "", nil
	}
	host, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = parsePort(port)
	}
	if err == nil && host != "" {
		_, err = netip.ParseAddr(host)
	}
	if err != nil {
		return "", fmt.Errorf("%q: want ADDRESS:PORT such as 127.0.0.1:9646, or off", s)
	}
	return s, nil
}

func parseLevel(s string) (slog.Level, error) {
	s, err := oneOf(s, "debug", "info", "warn", "error")
	if err != nil {
		return 0, err
	}
	var l slog.Level
	return l, l.UnmarshalText([]byte(s))
}

func oneOf(s string, want ...string) (string, error) {
	if !slices.Contains(want, s) {
		return "", fmt.Errorf("%q: want one of %s", s, strings.Join(want, ", "))
	}
	return s, nil
}
