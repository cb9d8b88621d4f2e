package pathtest

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestCapture looks at the data path while pods talk: what is captured is what tshark reads, and it is what was selected.
func TestCapture(t *testing.T) {
	t.Parallel()
	s := newStage(t, "vxlan, udp", 1500, 1500)
	s.uses(t, 20*time.Second, "vxlan")

	// All four points, of one pod's pings only, while another connection is busy.
	x := s.transfer(t)
	file := filepath.Join(t.TempDir(), "all.pcapng")
	done := capture(s.first, "--all", "--pod", s.other.IPv4().String(), "-w", file, "--count", "8", "--duration", "90s", "icmp")
	pingUntil(t, s.pod, s.other, done)
	x.progress(t, 10*time.Second)
	x.stop(t)
	got := tshark(t, file, "frame.comment", "ip.src", "ip.dst", "udp.dstport", "icmp.type")
	seen := map[string]int{}
	for _, f := range got {
		comment, ports := f[0], f[3]
		contains(t, "comment", comment, ": passed, peer b, path vxlan")
		if !strings.Contains(f[4], "8") && !strings.Contains(f[4], "0") {
			t.Errorf("not ICMP: %q", f)
		}
		point, _, _ := strings.Cut(comment, ":")
		if outer := strings.Contains(ports, "4789"); outer != (point == "to-peer" || point == "from-peer") || outer != strings.Contains(f[1], "10.0.") {
			t.Errorf("%s has %q", point, f)
		}
		seen[point]++
	}
	if want := map[string]int{"from-pods": 2, "to-peer": 2, "from-peer": 2, "to-pods": 2}; !maps.Equal(seen, want) {
		t.Errorf("captured %v, want %v: %q", seen, want, got)
	}
	if out, err := exec.CommandContext(t.Context(), "tcpdump", "-nr", file).Output(); err != nil || strings.Count(string(out), " IP ") < 8 {
		t.Errorf("tcpdump: %v\n%s", err, out)
	}

	// A drop with its reason. The router is no member.
	list := capture(s.first, "--count", "1", "--reason", "not_member", "--duration", "90s")
	hosts.Within(t, 20*time.Second, "a drop is seen", func() error {
		if _, err := s.router.TryRun("bash", "-c", "echo x >/dev/udp/"+addrA+"/6080"); err != nil {
			return err
		}
		select {
		case out := <-list:
			contains(t, "tulle capture", out, "from-peer", "10.0.1.1:", "10.0.1.11:6080 UDP", "dropped: not_member", "1 packets captured")
			return nil
		case <-time.After(200 * time.Millisecond):
			return fmt.Errorf("nothing yet")
		}
	})

	// Wrong names are refused with what would be right.
	for _, tc := range []struct{ arg, want string }{
		{"--reason=too_large", "too_big"}, {"--point=tun", "from-pods"}, {"--peer=nobody", "known are: b"},
	} {
		if _, errs, code := s.first.Tulle("capture", tc.arg); code != 2 && code != 1 || !strings.Contains(errs, tc.want) {
			t.Errorf("%s: exit code %d, %s; want %q", tc.arg, code, errs, tc.want)
		}
	}
}

// capture runs `tulle capture` beside the test, and sends what it printed when it has ended.
func capture(ag *hosts.Agent, args ...string) <-chan string {
	done := make(chan string, 1)
	go func() {
		out, errs, _ := ag.Tulle(append([]string{"capture"}, args...)...)
		done <- out + errs
	}()
	return done
}

// pingUntil pings between two pods until a capture has enough.
func pingUntil(t *testing.T, from, to *hosts.Pod, done <-chan string) {
	t.Helper()
	hosts.Within(t, 20*time.Second, "the capture has enough", func() error {
		if err := from.Ping(to.IPv4()); err != nil {
			return err
		}
		select {
		case out := <-done:
			contains(t, "tulle capture", out, "8 packets captured, 0 missed")
			return nil
		default:
			return fmt.Errorf("not yet")
		}
	})
}

// tshark reads a capture: the fields of each packet.
func tshark(t *testing.T, file string, fields ...string) (out [][]string) {
	t.Helper()
	args := []string{"-r", file, "-T", "fields", "-E", "separator=|"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	cmd := exec.CommandContext(t.Context(), "tshark", args...)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		out = append(out, strings.Split(strings.TrimSuffix(line, "\n"), "|"))
	}
	return out
}
