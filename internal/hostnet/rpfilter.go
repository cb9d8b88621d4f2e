package hostnet

import (
	"fmt"
	"strings"
)

// ReversePathProblems names the devices whose reverse path filter is strict, in the calling thread's network namespace: the
// kernel drops what arrives by them from addresses to which the way back leads elsewhere (net/ipv4/fib_frontend.c,
// __fib_validate_source). So do the packets of peers to which packets leave by another device, and those that pods of members
// without the tunnel for hosts send to this host's underlay address, since the way back to a pod is the tunnel. Of `all` and a device's own setting the
// larger counts, and 2 is loose (ip-sysctl.rst).
func ReversePathProblems(devices []string) ([]Problem, error) {
	const strict = "1"
	key := func(device string) string { return "net/ipv4/conf/" + device + "/rp_filter" }
	all, err := readSysctl(key("all"))
	if err != nil {
		return nil, fmt.Errorf("hostnet: read sysctl %s: %w", key("all"), err)
	}
	var out []Problem
	for _, d := range devices {
		own, err := readSysctl(key(d))
		if err != nil || max(all, own) != strict { // one digit each
			continue
		}
		out = append(out, Problem{
			What: fmt.Sprintf("the reverse path filter of %s is strict (%s=%s, %s=%s; the larger counts): packets that arrive by it are dropped where the way back to their sender is another interface",
				d, dotted(key("all")), all, dotted(key(d)), own),
			Remedy:  fmt.Sprintf("sysctl -w %s=2, and the same line in a file in /etc/sysctl.d", dotted(key(d))),
			Command: fmt.Sprintf("sysctl -w %s=2", dotted(key(d))),
		})
	}
	return out, nil
}

// dotted is a sysctl's name as sysctl(8) takes it: dots in the name of a device, as of a VLAN, become slashes.
func dotted(path string) string {
	return strings.NewReplacer("/", ".", ".", "/").Replace(path)
}
