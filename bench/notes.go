package bench

import (
	"fmt"

	"github.com/tulle-net/tulle/bench/traffic"
	"github.com/tulle-net/tulle/internal/lab"
)

// notes describe the method.
func notes(o *AllOptions, idle idling) []string {
	awake := "A SCHED_IDLE thread spins on each CPU, yielding every few microseconds, so none halts."
	others := "CPUs may halt"
	switch idle {
	case polls:
		awake, others = "Idle CPUs poll, so none halts.", "idle CPUs poll, too"
	case halts:
		awake = "CPUs halt when idle: a wake-up takes less time so than if threads spun on them, as a short trial found."
	}
	n := []string{
		map[lab.Wire]string{
			lab.WireCut: "Wire: cut. Links carry frames of the MTU, as between NICs. The sender's CPU cuts super-packets, which a NIC would do for " +
				"bare TCP and for some tunnels. Receivers join segments (GRO). The router has a queue of 1,000 frames toward each host.",
			lab.WireWhole: "Wire: whole. Links carry super-packets of 64 KiB, which no NIC does. Figures are higher than between machines, most of all without a tunnel and in the kernel's.",
		}[o.Wire] + " FRAME is the mean frame from sender to receiver during TCP, in bytes.",
		"Setup: two hosts in two subnets, a router, one pod per host. All are network namespaces on this machine and share its CPUs. " +
			"Each mode has its own lab; only one mode has traffic at a time.",
		fmt.Sprintf("Rounds: %d. Each measure is taken for all modes before the next measure begins. Values: median (lowest–highest). "+
			"Ratios are taken within each round. In each round another mode is the first.", o.Rounds),
		"Half round trip: one UDP datagram at a time between blocking sockets. " + awake + " " +
			"Ends and tunnel run at nice -20. Unpinned, the scheduler usually puts both ends on one CPU. Pinned, the sender and its host's tunnel process get the " +
			"first half of the CPUs, the receiver and its host's the second.",
		fmt.Sprintf("Fixed rate: %d datagrams a second whether or not answers come; each time counts from when the datagram was due, so nothing is omitted.", openRate),
		"TCP request/response: 64 bytes each way on one connection, or on one connection each; the whole time. CPUs as for half round trips, not pinned.",
		"Intervals: 95 %, of the median, by bootstrap over the rounds; none for fewer than five.",
		"All other measures: " + others + ", nothing is pinned, nice 0.",
		fmt.Sprintf("UDP rate: the highest rate with at most %.1f %% loss in a trial of %v, counted at the receiver. Sent with sendmmsg about every %v, "+
			"received with recvmmsg. Two of three confirming trials must hold; the result is their median. If the unpaced sender loses nothing, the sender is the limit.",
			100*traffic.LossAllowed, o.Duration/4, traffic.Pace),
		"UDP throughput: full packets for the pods' MTU, as fast as the senders can; each flow has its own sockets and threads. Goodput: the payload of the UDP rate of full packets.",
		"CPU per million packets: all CPU time of the machine in the trial that gave the UDP rate, until the last datagram has arrived, per 10^6 datagrams received.",
		"Time in the agents: mean time of each step for each packet as the underlay carries it, in one of eight batches. System calls: CPU time of the thread; the rest: elapsed. " +
			"Waiting is not in it. Only where agents of Tulle carry the packets.",
		"direct and no-tunnel-subnet: both hosts in one subnet, with a switch in place of the router, and the same links. They are compared with each other only.",
		"CPU: all CPU time of the machine during one TCP stream (softirqs, sender and receiver included), without unrelated processes, per 10^9 bytes received.",
		"Memory: resident set of the larger of the tunnel's two processes at the end of each round.",
	}
	return n
}
