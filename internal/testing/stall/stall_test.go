package stall

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestCounter(t *testing.T) {
	began := time.Now()
	c := &counter{woke: began}
	for _, s := range []struct {
		at, want time.Duration // ms
		asleep   bool          // asked during a sleep
	}{
		{at: 10, want: 0},
		{at: 69, want: 0},
		{at: 369, want: 290, asleep: true},
		{at: 469, want: 390},
		{at: 479, want: 390},
		{at: 539, want: 440},
	} {
		now := began.Add(s.at * time.Millisecond)
		if !s.asleep {
			c.wake(now)
		}
		if got := c.stalled(now); got != s.want*time.Millisecond {
			t.Errorf("after %d ms: %v stalled, want %d ms", s.at, got, s.want)
		}
	}
}

func TestParsePressure(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"some avg10=88.04 avg60=68.46 avg300=44.00 total=258365970\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n": 258365970 * time.Microsecond,
		"": 0, "some\n": 0, "full avg10=0.00 total=7\n": 0, "some avg10=0.00 total=x\n": 0,
	} {
		if got := parsePressure([]byte(text)); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

// Twice as many busy processes as CPUs: some wait for a CPU, where the kernel counts that.
func TestShort(t *testing.T) {
	if pressed() == 0 {
		t.Skip("this kernel does not count who waits for a CPU, or nobody ever has")
	}
	m := Begin()
	var children []*exec.Cmd
	for range 2 * runtime.NumCPU() {
		c := exec.Command("sh", "-c", "while :; do :; done")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		children = append(children, c)
	}
	defer func() {
		for _, c := range children {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	}()
	for began := time.Now(); m.Short() < 200*time.Millisecond; time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > 20*time.Second {
			t.Fatalf("short of CPUs for %v of 20 s", m.Short())
		}
	}
}

// The process of this test is stopped for a second, and says that it was.
func TestStoppedProcess(t *testing.T) {
	const child, stop = "TULLE_STALL_CHILD", time.Second
	if os.Getenv(child) != "" {
		m := Begin()
		fmt.Println("begun")
		_, _ = os.Stdin.Read(make([]byte, 1))
		fmt.Println(m.Stalled())
		os.Exit(0)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestStoppedProcess$")
	cmd.Env = append(os.Environ(), child+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var begun, got string
	if _, err := fmt.Fscanln(out, &begun); err != nil {
		t.Fatal(err)
	}
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT} {
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if sig == syscall.SIGSTOP {
			time.Sleep(stop)
		}
	}
	in.Close()
	if _, err := fmt.Fscanln(out, &got); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	stalled, err := time.ParseDuration(strings.TrimSpace(got))
	if took := time.Since(began); err != nil || stalled < stop-2*tick-late || stalled > took {
		t.Errorf("stopped for %v within %v, it measured %q: %v", stop, took, got, err)
	}
}
