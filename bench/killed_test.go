package bench

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
)

// A run that is killed leaves labs, but no process of its own. The next run of its name removes them all, also those of modes
// that it does not measure itself.
func TestAllKilled(t *testing.T) {
	o := labOptions(t, "kill", NoTunnel)
	o.Rounds, o.Measures = 1, []string{Delay}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(self, "all", o.Name)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	measures := false
	for lines := bufio.NewScanner(out); !measures && lines.Scan(); {
		measures = strings.HasPrefix(lines.Text(), "round 2 of 1000")
	}
	if err := c.Process.Kill(); err != nil || !measures {
		t.Fatalf("the run did not measure: %v", err)
	}
	_ = c.Wait()
	ours := func() (names []string) {
		labs, err := lab.List()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range labs {
			if strings.HasPrefix(l, o.Name) {
				names = append(names, l)
			}
		}
		return names
	}
	if left := ours(); len(left) != 2 {
		t.Fatalf("the killed run has left %v", left)
	}
	for deadline := time.Now().Add(30 * time.Second); len(strays(self)) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("processes of the killed run: %v", strays(self))
		}
	}
	var said []string
	o.Progress = func(s string) { said = append(said, s) }
	if _, err := All(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if left := ours(); len(left) > 0 || !strings.Contains(strings.Join(said, "\n"), "removed lab "+o.Name+"-1") {
		t.Errorf("after the next run %v is left; it said %q", left, said)
	}
}

// strays are the helpers of a test binary that are not this process's own.
func strays(exe string) (out []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		dir := filepath.Dir(f)
		line, _ := os.ReadFile(f)
		is, _ := os.Readlink(filepath.Join(dir, "exe"))
		var stat, parent string
		if b, err := os.ReadFile(filepath.Join(dir, "stat")); err == nil {
			_, stat, _ = strings.Cut(string(b), ") ")
			_, _ = fmt.Sscan(stat, new(string), &parent)
		}
		if is == exe && strings.Contains(string(line), "\x00helper\x00") && parent != fmt.Sprint(os.Getpid()) {
			out = append(out, filepath.Base(dir))
		}
	}
	return out
}
