package podnet

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tulle-net/tulle/internal/sys"
)

// Settings are sysctls, by their names below /proc/sys/net with their values. The kernel has those of IPv6 only for devices that have
// IPv6 (an MTU of 1,280 bytes and more).

// settingsOf are those of the host's end of a pod's link.
func settingsOf(a *Attachment) [][2]string {
	conf4, conf6 := "ipv4/conf/"+a.HostInterface+"/", "ipv6/conf/"+a.HostInterface+"/"
	if a.Bridge != "" {
		return [][2]string{{conf6 + "disable_ipv6", "1"}} // a port speaks for nobody: it needs no link-local address
	}
	out := [][2]string{sys.NoDAD(a.HostInterface), {conf4 + "forwarding", "1"}, {conf6 + "forwarding", "1"},
		{conf6 + "accept_ra", "0"}} // a pod is no router of the host's
	if hasSix(a) {
		out = append(out, [2]string{conf6 + "disable_ipv6", "0"}) // hosts may disable it by default
	}
	return out
}

// settingsOfBridge are those of a bridge of pods; six: a pod behind it has IPv6.
func settingsOfBridge(name string, six bool) [][2]string {
	conf4, conf6 := "ipv4/conf/"+name+"/", "ipv6/conf/"+name+"/"
	out := [][2]string{
		sys.NoDAD(name), {conf4 + "forwarding", "1"}, {conf6 + "forwarding", "1"}, {conf6 + "accept_ra", "0"},
		// Gateway6 is its only link-local address.
		{conf6 + "addr_gen_mode", "1"},
		// The host answers ARP for what pods expect on the bridge and is not there: pods on links of their own.
		{conf4 + "proxy_arp", "1"}, {"ipv4/neigh/" + name + "/proxy_delay", "0"},
	}
	if six {
		out = append(out, [2]string{conf6 + "disable_ipv6", "0"}) // hosts may disable it by default
	}
	return out
}

// wrong is a setting that is not as Add has left it.
type wrong struct{ name, is, want string }

func (w wrong) String() string {
	return fmt.Sprintf("sysctl net/%s=%s (was: %s)", w.name, w.want, w.is)
}

// wrongSettings compares the settings of a pod's link, and of the bridge that it is behind, with those that they should have.
func (h *Host) wrongSettings(a *Attachment) (out []wrong, err error) {
	list := settingsOf(a)
	if a.Bridge != "" {
		if b, err := h.nl.LinkByName(a.Bridge); err == nil && ours(b) {
			list = append(list, settingsOfBridge(a.Bridge, hasSix(a))...)
		}
	}
	err = h.do(func() error {
		for _, s := range list {
			is, err := os.ReadFile(filepath.Join("/proc/sys/net", s[0]))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return fmt.Errorf("podnet: read sysctl net/%s: %w", s[0], err)
			}
			if got := string(bytes.TrimSpace(is)); got != s[1] {
				out = append(out, wrong{s[0], got, s[1]})
			}
		}
		return nil
	})
	return out, err
}

// correct puts back the settings that are wrong, and returns a line for each.
func (h *Host) correct(a *Attachment) (repaired []string, err error) {
	list, err := h.wrongSettings(a)
	if err != nil {
		return nil, err
	}
	settings := make([][2]string, len(list))
	for i, w := range list {
		settings[i] = [2]string{w.name, w.want}
		repaired = append(repaired, w.String())
	}
	if err := h.do(func() error { return sys.SetSysctls(settings...) }); err != nil {
		return nil, fmt.Errorf("podnet: the pod %s: %w", a.ID, err)
	}
	return repaired, nil
}
