package hostnet

import (
	"fmt"
	"strconv"
)

// ConntrackFull is the part of the connection tracking table, in percent, from which it counts as full. In a full one the kernel drops the first
// packet of every new connection that it cannot make room for.
const ConntrackFull = 95

// Conntrack is how many connections the kernel tracks in this network namespace, and how many it can; both are -1 where it tracks none.
func Conntrack() (count, limit int) {
	return conntrackValue("count"), conntrackValue("max")
}

func conntrackValue(name string) int {
	v, err := readSysctl("net/netfilter/nf_conntrack_" + name)
	if err != nil {
		return -1
	}
	n, err := strconv.Atoi(v)
	if err != nil {
		return -1
	}
	return n
}

// ConntrackProblem says that the table is nearly full, whether or not it is.
func ConntrackProblem(count, limit int) Problem {
	return Problem{
		What:    fmt.Sprintf("the connection tracking table is nearly full, and new connections are dropped when it is: %d of %d connections (%d %%)", count, limit, 100*count/limit),
		Remedy:  "raise net.netfilter.nf_conntrack_max, in a file in /etc/sysctl.d, too (`tulle doctor conntrack` has the command)",
		Command: fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", 2*limit),
	}
}

// conntrackProblems is that of a table that counts as full.
func conntrackProblems(count, limit int) []Problem {
	if limit <= 0 || 100*count/limit < ConntrackFull {
		return nil
	}
	return []Problem{ConntrackProblem(count, limit)}
}

// ConntrackProblems reports a table that is full.
func ConntrackProblems() []Problem { return conntrackProblems(Conntrack()) }
