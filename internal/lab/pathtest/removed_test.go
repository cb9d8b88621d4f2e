package pathtest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestDevicesRemoved removes and renames the agent's devices while it runs: it makes them again by itself, and does not end.
func TestDevicesRemoved(t *testing.T) {
	t.Parallel()
	s := newSubnet(t, "direct,udp")
	s.allDirect(t)
	started := s.first.Status().Started
	for _, tc := range []struct{ name, command, gone, log string }{
		{"the device of direct probes is removed", "link del tulle-direct", "", "somebody has removed the device for probes of direct paths"},
		{"the TUN device is removed", "link del tun0", "", "the TUN device was removed, starting again"},
		{"the TUN device is removed once more", "link del tun0", "", "the TUN device was removed, starting again"},
		{"the TUN device is renamed", "link set tun0 name other0", "other0", "device tun0 (was: other0)"},
	} {
		s.a.IP(tc.command)
		hosts.Within(t, 20*time.Second, tc.name+": the devices are there", func() error {
			for _, d := range []string{"tun0", "tulle-direct"} {
				if _, err := s.a.TryRun("ip", "link", "show", d); err != nil {
					return err
				}
			}
			if st, err := s.first.TryStatus(); err != nil || !st.Ready {
				return fmt.Errorf("ready %v, problems %v: %w", st.Ready, st.Problems, err)
			}
			return nil
		})
		s.reach(t)
		s.allDirect(t)
		hosts.NoProblems(t, tc.name, s.first)
		if st := s.first.Status(); !st.Started.Equal(started) {
			t.Errorf("%s: the agent has started at %v, want %v as before", tc.name, st.Started, started)
		}
		if !strings.Contains(s.first.Log(), tc.log) {
			t.Errorf("%s: the log does not say %q:\n%s", tc.name, tc.log, s.first.Log())
		}
		if tc.gone != "" {
			if _, err := s.a.TryRun("ip", "link", "show", tc.gone); err == nil {
				t.Errorf("%s: %s is there", tc.name, tc.gone)
			}
		}
	}
}
