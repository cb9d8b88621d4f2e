package bench

import (
	"fmt"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/lab"
)

// What makes figures wrong without a measure having failed.

const (
	// cutAllowed is how many frames may leave the router for one that came: those of other traffic are among them.
	cutAllowed = 1.05
	// vxlanLeast is the least share of TCP without a tunnel that the kernel's VXLAN carries where nothing is in its way.
	vxlanLeast = 0.6
	// bareLeast is the least share of any tunnel's TCP that no tunnel at all carries.
	bareLeast = 0.9
)

// warnings are the reasons not to trust figures, those of whole modes first.
func warnings(r *result.Run) []string {
	var out []string
	warn := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	for i := range r.Modes {
		m := &r.Modes[i]
		c := m.Crossing()
		switch frame := float64(r.MTU + 14); {
		case c.Cut() > cutAllowed:
			warn("%s: the router sent %.1f frames on for each that came. What it carries is cut on the way, so its figures are too low, and ratios to it too high.", m.Name, c.Cut())
		case r.Wire == string(lab.WireCut) && c.FrameBytes() > frame:
			warn("%s: frames of %.0f bytes crossed a wire of MTU %d. Its figures are too high.", m.Name, c.FrameBytes(), r.MTU)
		}
	}
	if s, ok := r.Ratio(KernelVXLAN, NoTunnel, "tcp1_gbps"); ok && s.Median < vxlanLeast {
		warn("%s carries %.2f of %s in one TCP stream; where nothing else is in its way, at least %g. It is slower than it must be, so ratios to it flatter.",
			KernelVXLAN, s.Median, NoTunnel, vxlanLeast)
	}
	for _, m := range r.Modes {
		if s, ok := r.Ratio(m.Name, NoTunnel, "tcp1_gbps"); ok && s.Median > 1/bareLeast {
			warn("%s carries %.2f of %s in one TCP stream: no tunnel is slower than it must be.", m.Name, s.Median, NoTunnel)
		}
	}
	return append(out, r.Doubts()...)
}
