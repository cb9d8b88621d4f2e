package pair

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/bench/traffic"
)

// limits say what the run holds back.
func (rn *runner) limits() []string {
	if most := rn.c.welcome.MaxRate; !rn.o.Gentle && most > 0 {
		return []string{fmt.Sprintf("The server allows %s Gb/s, and every measure keeps to it: no figure can be higher. Datagrams and requests that wait for an answer "+
			"come less often where the limit asks for it, and CPUs may halt between them.", result.Digits(most/1e9))}
	}
	if !rn.o.Gentle {
		return nil
	}
	return []string{fmt.Sprintf("Held to %s Mb/s and to %s exchanges a second, so that others on this network notice little: throughput is at most that, whatever the paths could carry.",
		result.Digits(rn.c.welcome.MaxRate/1e6), result.Digits(rn.o.Rate))}
}

// longer says how long TCP streams warm up where that is longer than the others.
func (rn *runner) longer() string {
	if warm := rn.warmTCP(); warm > rn.o.warm() {
		return fmt.Sprintf(", with TCP streams of %v, because a round trip takes %v", warm.Round(time.Millisecond), rn.c.trip.Round(100*time.Microsecond))
	}
	return ""
}

// gentleNotes describe the method of a run between members.
func (rn *runner) gentleNotes() []string {
	o := &rn.o
	return append(rn.limits(),
		fmt.Sprintf("%d rounds of %v for each measure, after %v of warm-up%s; in each round the paths come one after the other, and another is the first.",
			o.Rounds, o.Duration, o.warm().Round(time.Millisecond), rn.longer()),
		"Traffic goes between addresses of the two hosts themselves, through the agents as pods' packets do; a pod's own link is not part of it. Pods' packets keep the way that they had.",
		"Half RTT: one UDP datagram at a time; half of the round trip. CPUs may halt between exchanges and nothing is pinned: this includes what it costs to wake a process.",
		"Fixed rate: datagrams go whether or not answers come; each time counts from when the datagram was due.",
		"UDP: full packets at the limit; what does not arrive is lost.",
		"The path MTU of each way is the largest packet with the don't-fragment bit that was answered.",
		"Intervals: 95 %, of the median, by bootstrap over the rounds; none for fewer than five.",
	)
}

// notes describe the method.
func (rn *runner) notes() []string {
	o := &rn.o
	if o.Gentle {
		return rn.gentleNotes()
	}
	n := []string{
		fmt.Sprintf("Traffic goes from this end to the server; only answers come back. %d rounds of %v for each measure, after %v of warm-up%s. Each round begins with another measure.",
			o.Rounds, o.Duration, o.warm().Round(time.Millisecond), rn.longer()),
		"Half RTT: one UDP datagram at a time between blocking sockets; half of the round trip. CPUs may halt and nothing is pinned, as for an ordinary program: " +
			"this includes what it costs to wake a process.",
		fmt.Sprintf("Fixed rate: %s datagrams a second whether or not answers come; each time counts from when the datagram was due, so nothing is omitted.", result.Digits(rn.openRate(o.Sizes[0]))),
		fmt.Sprintf("TCP request/response: %d bytes each way, on one connection, or on one connection each; the whole time.", traffic.Request),
		fmt.Sprintf("UDP, no loss: the highest rate with at most %.1f %% loss in a trial of %v; full packets fill the path MTU, %d bytes of payload. If the unpaced sender loses nothing, "+
			"the sender is the limit. UDP flows: full packets as fast as the sender can.", 100*traffic.LossAllowed, o.Duration/4, rn.full),
		fmt.Sprintf("The path MTU, %d bytes, is the largest packet with the don't-fragment bit that was answered.", rn.r.MTU),
		"Intervals: 95 %, of the median, by bootstrap over the rounds; none for fewer than five.",
	}
	if rn.deaf != nil {
		n = slices.DeleteFunc(n, func(s string) bool {
			return strings.Contains(s, "UDP") || strings.HasPrefix(s, "Fixed rate") || strings.HasPrefix(s, "The path MTU")
		})
	}
	cpu := "CPU: all CPU time of both machines with softirqs, sender and receiver together, without what other processes used that this one can see. In a container it sees few."
	if rn.one {
		cpu = "Both ends are on one machine: CPU is all that it did, other processes included, and no network device was crossed unless the ends are in namespaces."
	}
	return append(append(n, cpu), rn.limits()...)
}
