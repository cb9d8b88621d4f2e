package api

import (
	"net/netip"
	"slices"
	"strings"
	"unicode"
)

// encapsulations that an external peer may have.
var encapsulations = []string{"udp", "ipip", "vxlan", "direct"}

// LogLevels are the levels of the log, from the most talkative.
var LogLevels = []string{"debug", "info", "warn", "error"}

func usage(format string, args ...any) error { return Errorf(CodeUsage, format, args...) }

// checkText refuses text that is empty (unless optional), too long, or has characters that garble a terminal or a log.
func checkText(what, s string, limit int, optional bool) error {
	switch {
	case s == "" && !optional:
		return usage("%s is empty", what)
	case len(s) > limit:
		return usage("%s is %d bytes long, the limit is %d", what, len(s), limit)
	case strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return usage("%s %q has characters that cannot be printed", what, s)
	}
	return nil
}

func (r PingRequest) validate() error {
	if r.Count < 0 || r.Count > MaxPingCount {
		return usage("count %d: the limits are 1 and %d", r.Count, MaxPingCount)
	}
	return checkText("node", r.Node, MaxNameLen, false)
}

func (r LogLevelRequest) validate() error {
	if r.Level != "" && !slices.Contains(LogLevels, r.Level) {
		return usage("log level %q: want one of %s", r.Level, strings.Join(LogLevels, ", "))
	}
	return nil
}

func (r ReleaseRequest) validate() error {
	if r.All == (len(r.Addresses) > 0) {
		return usage("release needs either addresses or all")
	}
	return nil
}

func (r AllocateRequest) validate() error {
	if err := checkText("id", r.ID, MaxIDLen, false); err != nil {
		return err
	}
	if err := checkText("name", r.Name, MaxNameLen, true); err != nil {
		return err
	}
	if err := checkText("netns", r.Netns, maxPathLen, true); err != nil {
		return err
	}
	if err := checkText("from", r.From, MaxIDLen, true); err != nil {
		return err
	}
	var seen4, seen6 bool
	for _, a := range r.Requested {
		seen := &seen6
		if a.Unmap().Is4() {
			seen = &seen4
		}
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
			return usage("requested address %q is not a plain IPv4 or IPv6 address", a)
		}
		if *seen {
			return usage("requested addresses %v: at most one of each family", r.Requested)
		}
		*seen = true
	}
	return nil
}

func (r FreeRequest) validate() error { return checkText("id", r.ID, MaxIDLen, false) }

func (r ForgetRequest) validate() error { return checkText("node", r.Node, MaxNameLen, false) }

func (r ExternalRequest) validate() error {
	if err := checkPrefix(r.Prefix); err != nil {
		return err
	}
	if !r.Endpoint.IsValid() || r.Endpoint.Zone() != "" || r.Endpoint.Is4In6() || !r.Endpoint.IsGlobalUnicast() {
		return usage("endpoint %q: want the unicast address of the external peer", r.Endpoint)
	}
	if err := checkText("mac", r.MAC, len("02:00:00:00:00:00"), true); err != nil {
		return err
	}
	if slices.Contains(encapsulations, r.Encapsulation) {
		return nil
	}
	return usage("encapsulation %q: want one of %s", r.Encapsulation, strings.Join(encapsulations, ", "))
}

func checkPrefix(p netip.Prefix) error {
	if !p.IsValid() || p.Addr().Is4In6() {
		return usage("prefix %q is not a CIDR prefix such as 10.244.7.0/24", p)
	}
	if m := p.Masked(); m != p {
		return usage("prefix %s has host bits set; write %s", p, m)
	}
	return nil
}

func (r KeyRequest) validateInstall() error {
	if len(r.Key) != KeySize {
		return usage("key is %d bytes long: AES-256 needs %d", len(r.Key), KeySize)
	}
	return nil
}

func (r KeyRequest) validateID() error {
	if len(r.Key) != 0 {
		return usage("name the key by the ID that `tulle keys list` shows")
	}
	return checkText("key id", r.ID, 64, false)
}
