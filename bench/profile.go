package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// profile records a CPU profile of the whole machine, kernel and processes, for each mode: first with one TCP stream, then
// with small datagrams at full speed. It needs perf(1).
func (run *allRun) profile(ctx context.Context) error {
	perf, err := findPerf()
	if err != nil {
		return err
	}
	for _, s := range run.stands {
		run.o.Progress("profile of " + s.name)
		tcp := func() error {
			_, err := measureTCP(ctx, &s.ends, 1, 0, run.o.Duration+time.Second, s.tunnel.pids)
			return err
		}
		udp := func() error {
			_, err := udpTrial(ctx, &s.ends, 64, 1, 0, run.o.Duration+time.Second, s.tunnel.pids)
			return err
		}
		for name, traffic := range map[string]func() error{"tcp": tcp, "udp64": udp} {
			file := filepath.Join(run.o.Profile, s.name+"-"+name)
			if err := record(ctx, perf, file, run.o.Duration, traffic); err != nil {
				return fmt.Errorf("profile of %s: %w", s.name, err)
			}
		}
	}
	return nil
}

func findPerf() (string, error) {
	perf, err := exec.LookPath("perf")
	if err != nil {
		return "", errors.New("a profile needs perf, which is not installed: install it (Debian: apt install linux-perf), or leave --profile out")
	}
	return perf, nil
}

// checkProfile returns an error if profiles cannot be recorded or written, before minutes of measuring. It makes their folder.
func (o *AllOptions) checkProfile() error {
	if o.Profile == "" {
		return nil
	}
	if _, err := findPerf(); err != nil {
		return err
	}
	return os.MkdirAll(o.Profile, 0o755)
}

// record profiles the time d while traffic runs. It writes file.perf (perf's data) and file.txt (its report by process and
// symbol).
func record(ctx context.Context, perf, file string, d time.Duration, traffic func() error) error {
	moved := make(chan error, 1)
	go func() { moved <- traffic() }()
	var out strings.Builder
	rec := exec.CommandContext(ctx, perf, "record", "-a", "-g", "-F", "1999", "-o", file+".perf", "--", "sleep", fmt.Sprintf("%.3f", d.Seconds()))
	rec.Stderr = &out
	err := rec.Run()
	if err != nil {
		err = fmt.Errorf("perf record: %w: %s", err, strings.TrimSpace(out.String()))
	}
	if err := errors.Join(err, <-moved); err != nil {
		return err
	}
	report := exec.CommandContext(ctx, perf, "report", "-i", file+".perf", "--stdio", "--no-children", "-g", "none", "--sort", "comm,symbol", "--percent-limit", "0.3")
	text, err := report.Output()
	if err != nil {
		return fmt.Errorf("perf report: %w", err)
	}
	return os.WriteFile(file+".txt", text, 0o644)
}
