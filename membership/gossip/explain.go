package gossip

import (
	"errors"
	"strings"
	"syscall"
)

// The reasons of an attempt that nobody has answered.
const (
	reasonNobody  = "nothing listens there"
	reasonSilence = "no answer"
	reasonNoRoute = "no route: "
)

// isSilence reports whether a reason means that nobody has answered.
func isSilence(reason string) bool {
	return reason == reasonNobody || reason == reasonSilence || strings.HasPrefix(reason, reasonNoRoute)
}

// sameSilence reports whether two reasons are the same: "no answer" and "no route" alternate for a host that is off, as its kernel
// neighbour's entry comes and goes.
func sameSilence(a, b string) bool {
	gone := func(reason string) bool { return reason == reasonSilence || strings.HasPrefix(reason, reasonNoRoute) }
	return a == b || gone(a) && gone(b)
}

// explainJoin turns the error of a join into what an operator can act upon.
// memberlist wraps some errors as text only, hence the search in it.
func explainJoin(err error, keyed bool) (reason, remedy string) {
	if err == nil {
		return "", ""
	}
	text := strings.TrimSpace(err.Error())
	if i := strings.LastIndex(text, "failed to join "); i >= 0 {
		if _, after, ok := strings.Cut(text[i:], ": "); ok {
			text = strings.TrimSpace(after)
		}
	}
	has := func(s string) bool { return strings.Contains(strings.ToLower(text), s) }
	switch {
	case errors.Is(err, errNoFamily):
		return text, "give this host an address of that family, or the seed one of this host's"
	case has("no installed keys could decrypt"):
		return "it uses another gossip key", "give both the same --gossip-key-file"
	case has("remote error: remote state is encrypted"), has("but remote state is not encrypted"):
		return "it runs without a gossip key, this node with one", "give it the same --gossip-key-file"
	case has("remote state is encrypted"), has("encryption is configured"):
		return "it asks for a gossip key, this node has none", "copy its key file here and name it with --gossip-key-file"
	case has("belongs to cluster"):
		return text, foreignRemedy
	case has("identity is listed at another address"):
		return text, "wait: the address is asked; if this host has moved, it is let in as soon as nobody has answered there"
	case has("incompatible"):
		return text, "run agents of compatible versions"
	case has(syscall.ECONNREFUSED.Error()):
		return reasonNobody, "start the agent there, and see that it uses this --gossip-port"
	case has("timeout"), has("deadline exceeded"):
		return reasonSilence, "is the host up, and does a firewall let TCP and UDP of the gossip port through?"
	case has(syscall.EHOSTUNREACH.Error()), has(syscall.ENETUNREACH.Error()):
		return reasonNoRoute + text, "check the route to it, and its link"
	case has(syscall.EADDRNOTAVAIL.Error()):
		return reasonNoRoute + "this host does not have its own underlay address: " + text, "give the address back to this host"
	case keyed && has("eof"), has("connection reset"):
		return "it closed the connection", "read its log: it may use another gossip key, or be no Tulle agent"
	}
	return text, "read the seed's log"
}
