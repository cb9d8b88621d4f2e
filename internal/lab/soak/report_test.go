package soak

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// healed is how long a cluster took after a fault had ended.
type healed struct {
	flowing time.Duration // until a new datagram had arrived for every pair of pods
	whole   time.Duration // until all agents were ready, too, saw each other and named no problem
}

// report collects the figures of a run.
type report struct {
	seed               uint64
	began              time.Time
	length             time.Duration // until the last fault had healed
	healed             map[string][]healed
	calmSent, calmLost uint64   // datagrams while nothing happened
	sizes              [][]size // of all agents, at the start and at the end
}

func newReport(plan schedule) *report {
	return &report{seed: plan.seed, began: time.Now(), healed: map[string][]healed{}}
}

// write logs the report, in Markdown, and writes it to the file that TULLE_SOAK_REPORT names.
func (r *report) write(t *testing.T, x *traffic) {
	text := r.text(t.Failed(), x)
	t.Logf("\n%s", text)
	if path := os.Getenv("TULLE_SOAK_REPORT"); path != "" {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Error(err)
		}
	}
}

func (r *report) text(failed bool, x *traffic) string {
	var b strings.Builder
	if failed {
		b.WriteString("**This run failed.**\n\n")
	}
	n := 0
	for _, all := range r.healed {
		n += len(all)
	}
	sent, received := x.totals()
	fmt.Fprintf(&b, "Run of %s, with seed %d, on %s.\n\n", r.began.UTC().Format("2 January 2006, 15:04 UTC"), r.seed, platform())
	fmt.Fprintf(&b, "%v, %d faults. %d datagrams sent between pods, %d received (what is missing was lost while something was broken); %d arrived at the wrong pod, changed, or twice. ",
		r.length.Round(time.Second), n, sent, received, x.wrongs())
	fmt.Fprintf(&b, "In the seconds after each fault had healed: %d sent, %d lost.\n\n", r.calmSent, r.calmLost)
	b.WriteString("| fault | times | all pods reach each other again: median | longest | and all agents find everything in order: median | longest |\n|---|---|---|---|---|---|\n")
	for _, f := range faults {
		all := r.healed[f.name]
		if len(all) == 0 {
			continue
		}
		fmt.Fprintf(&b, "| %s | %d |", f.name, len(all))
		for _, of := range []func(healed) time.Duration{func(h healed) time.Duration { return h.flowing }, func(h healed) time.Duration { return h.whole }} {
			var times []time.Duration
			for _, h := range all {
				times = append(times, of(h))
			}
			slices.Sort(times)
			fmt.Fprintf(&b, " %.1f s | %.1f s |", times[(len(times)-1)/2].Seconds(), times[len(times)-1].Seconds())
		}
		b.WriteString("\n")
	}
	if len(r.sizes) < 2 {
		return b.String()
	}
	b.WriteString("\n| agent | goroutines at the start, at the end | open files | resident memory, MiB |\n|---|---|---|---|\n")
	for i, was := range r.sizes[0] {
		is, note := r.sizes[1][i], ""
		if i == len(r.sizes[0])-1 {
			note = ", never restarted"
		}
		fmt.Fprintf(&b, "| %c%s | %d, %d | %d, %d | %.1f, %.1f |\n", 'a'+i, note, was.goroutines, is.goroutines, was.files, is.files, mib(was.resident), mib(is.resident))
	}
	return b.String()
}

func mib(bytes int) float64 { return float64(bytes) / (1 << 20) }

// platform names what the run was on.
func platform() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err.Error()
	}
	var i unix.Sysinfo_t
	if err := unix.Sysinfo(&i); err != nil {
		return err.Error()
	}
	release := unix.ByteSliceToString(u.Release[:])
	release, _, _ = strings.Cut(release, "-") // what follows is the builder's
	return fmt.Sprintf("Linux %s, %s, %d CPUs, %d GiB of memory, %s", release, runtime.GOARCH, runtime.NumCPU(), (uint64(i.Totalram)*uint64(i.Unit)+1<<29)>>30, runtime.Version())
}
