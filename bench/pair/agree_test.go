package pair

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/internal/testing/detour"
	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// tools are what others measure with, with their servers in a namespace.
type tools struct {
	t        *testing.T
	a, b     *namespace.Namespace
	host     string // of the servers
	tulle    string
	duration time.Duration // of each of this program's measures
	omit     string        // seconds that iperf3 omits at the beginning
}

func newTools(t *testing.T, a, b *namespace.Namespace, host string) *tools {
	t.Helper()
	x := &tools{t: t, a: a, b: b, host: host, tulle: tulle(t), duration: 600 * time.Millisecond, omit: "0"}
	for _, server := range [][]string{{"iperf3", "-s"}, {"sockperf", "server", "-i", host}, {"qperf"}} {
		c := exec.Command(server[0], server[1:]...)
		b.Do(c.Start)
		t.Cleanup(func() {
			_ = c.Process.Kill()
			_ = c.Wait()
		})
	}
	serving(t, b, x.tulle)
	return x
}

// run returns what a tool prints, as soon as its server is there.
func (x *tools) run(argv ...string) string {
	x.t.Helper()
	for attempt := 1; ; attempt++ {
		var text, errs bytes.Buffer
		c := exec.Command(argv[0], argv[1:]...)
		c.Stdout, c.Stderr = &text, &errs
		x.a.Do(c.Start)
		failed := c.Wait()
		if failed == nil {
			return text.String()
		}
		if attempt == 20 {
			x.t.Fatalf("%v: %v\n%s%s", argv, failed, text.String(), errs.String())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// iperf returns what arrived, in Gb/s. The server is deaf for a moment after each run, which this client does not take for a failure of its own.
func (x *tools) iperf(args ...string) float64 {
	x.t.Helper()
	var out struct {
		Error string `json:"error"`
		End   struct {
			Received struct {
				Bits float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	for attempt := 1; ; attempt++ {
		text := x.run(append([]string{"iperf3", "-J", "-c", x.host, "-t", "2"}, args...)...)
		err := json.Unmarshal([]byte(text), &out)
		if err == nil && out.End.Received.Bits > 0 {
			return out.End.Received.Bits / 1e9
		}
		if attempt == 50 || !strings.Contains(out.Error, "Connection refused") {
			x.t.Fatalf("iperf3 %v: %v\n%s", args, err, text)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// sockperf returns the median of half round trips of 64 bytes over UDP, in µs.
func (x *tools) sockperf() float64 {
	x.t.Helper()
	return x.number(`percentile 50\.000 = +([0-9.]+)()`, "sockperf", "ping-pong", "-i", x.host, "-m", "64", "-t", "1")
}

// qperf returns the mean of half round trips of 64 bytes over TCP, in µs.
func (x *tools) qperf() float64 {
	x.t.Helper()
	return x.number(`latency += +([0-9.]+) ([mun]s)`, "qperf", "--precision", "4", "-m", "64", "-t", "1", x.host, "tcp_lat")
}

// number is the time in a tool's output, in µs: number and unit, of which none is µs.
func (x *tools) number(pattern string, argv ...string) float64 {
	x.t.Helper()
	text := x.run(argv...)
	found := regexp.MustCompile(pattern).FindStringSubmatch(text)
	if found == nil {
		x.t.Fatalf("%v: %s", argv, text)
	}
	v, err := strconv.ParseFloat(found[1], 64)
	if err != nil {
		x.t.Fatal(err)
	}
	return v * map[string]float64{"": 1, "us": 1, "ms": 1e3, "ns": 1e-3}[found[2]]
}

// own measures one group by this program, one round.
func (x *tools) own(group string) *result.Mode {
	x.t.Helper()
	return &measured(x.t, x.a, x.tulle, x.host, "--rounds", "1", "--duration", x.duration.String(), "--sizes", "64", "--measures", group).Modes[0]
}

// agreement is what this program and another tool measured, round by round.
type agreement struct {
	what         string
	ours, theirs []float64
}

// ratio is ours to theirs, with its interval over the rounds.
func (a *agreement) ratio() result.Spread {
	var r []float64
	for i := range a.ours {
		r = append(r, a.ours[i]/a.theirs[i])
	}
	return result.SpreadOf(r)
}

func (a *agreement) String() string {
	r, ours, theirs := a.ratio(), result.SpreadOf(a.ours), result.SpreadOf(a.theirs)
	text := fmt.Sprintf("| %s | %s | %s | %.3f", a.what, result.Digits(ours.Median), result.Digits(theirs.Median), r.Median)
	if r.High > 0 { // five rounds or more
		text += fmt.Sprintf(" (%.3f–%.3f)", r.Low, r.High)
	}
	return text + " |"
}

// throughput compares with iperf3, in rounds that begin with the one and the other in turns.
func (x *tools) throughput(rounds int) []*agreement {
	tcp, several, udp := &agreement{what: "TCP, one stream, Gb/s: iperf3"}, &agreement{what: "TCP, four streams, Gb/s: iperf3"}, &agreement{what: "UDP, as fast as it goes, Gb/s: iperf3"}
	for i := range rounds {
		inTurns(i, func() {
			s := x.own(Throughput).Summary
			tcp.ours, several.ours, udp.ours = append(tcp.ours, s["tcp1_gbps"].Median), append(several.ours, s["tcp4_gbps"].Median), append(udp.ours, s["udp_flood1_gbps"].Median)
		}, func() {
			tcp.theirs, several.theirs = append(tcp.theirs, x.iperf("-O", x.omit)), append(several.theirs, x.iperf("-O", x.omit, "-P", "4"))
			udp.theirs = append(udp.theirs, x.iperf("-u", "-b", "0", "-l", "1472"))
		})
	}
	return []*agreement{tcp, several, udp}
}

// latency compares with sockperf and qperf.
func (x *tools) latency(rounds int) []*agreement {
	udp, tcp := &agreement{what: "half a round trip over UDP, median, µs: sockperf"}, &agreement{what: "half a round trip over TCP, mean, µs: qperf"}
	for i := range rounds {
		inTurns(i, func() {
			m := x.own(Latency)
			udp.ours = append(udp.ours, m.Merged(result.PingPong, 64, false).At(50))
			rr := m.Merged(result.RR, 64, false)
			tcp.ours = append(tcp.ours, rr.Seconds/float64(rr.Answers)*1e6/2)
		}, func() {
			udp.theirs, tcp.theirs = append(udp.theirs, x.sockperf()), append(tcp.theirs, x.qperf())
		})
	}
	return []*agreement{udp, tcp}
}

func inTurns(i int, a, b func()) {
	if i%2 == 1 {
		a, b = b, a
	}
	a()
	b()
}

// Where the network is what limits and what delays, this program, iperf3, sockperf and qperf measure the same within 5 %. A
// busy machine has ten attempts at each figure. With TULLE_AGREE=ROUNDS the machine is the limit: that only prints figures.
func TestAgreesWithOtherTools(t *testing.T) {
	if testing.Short() {
		t.Skip("the race detector does not look into the programs that this runs")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: it makes network namespaces")
	}
	rounds, limit := 2, true
	if text := os.Getenv("TULLE_AGREE"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			t.Fatalf("TULLE_AGREE=%q: want a number of rounds", text)
		}
		rounds, limit = n, false
	}
	a, b := cable(t, limit)
	fast := newTools(t, a, b, "10.98.0.2")
	slow := fast
	if limit {
		w := &detour.Detour{}
		w.Delay(50 * time.Millisecond) // long beside what a busy machine adds, which is two milliseconds to the one and half of one to the other; TestKnownDelay has short ones
		a, b := carry(t, w)
		slow = newTools(t, a, b, "10.99.0.2")
		slow.duration = time.Second
	} else {
		fast.duration, fast.omit = time.Second, "1"
	}
	t.Run("throughput", func(t *testing.T) { agree(t, !limit, func() []*agreement { return fast.in(t).throughput(rounds) }) })
	t.Run("latency", func(t *testing.T) { agree(t, !limit, func() []*agreement { return slow.in(t).latency(rounds) }) })
}

// in is the same for a subtest.
func (x tools) in(t *testing.T) *tools {
	x.t = t
	return &x
}

// agree measures until the median of all rounds so far agrees, for each figure.
func agree(t *testing.T, figures bool, measure func() []*agreement) {
	var all []*agreement
	for attempt := 1; ; attempt++ {
		for i, a := range measure() {
			if i == len(all) {
				all = append(all, &agreement{what: a.what})
			}
			all[i].ours, all[i].theirs = append(all[i].ours, a.ours...), append(all[i].theirs, a.theirs...)
		}
		var not []string
		for _, a := range all {
			t.Log(a)
			if r := a.ratio().Median; r < 0.95 || r > 1.05 {
				not = append(not, a.String())
			}
		}
		if len(not) == 0 || figures {
			return
		}
		if attempt == 10 {
			t.Fatalf("these do not agree within 5 %%: %q", not)
		}
	}
}

// cable joins two namespaces, 10.98.0.1 and 10.98.0.2, by a veth that carries frames of 1,500 bytes: at most 100 Mb/s with a limit, which a busy machine, too, can fill.
func cable(t *testing.T, limit bool) (a, b *namespace.Namespace) {
	t.Helper()
	a, b = namespace.New(t), namespace.New(t)
	commands := [][]string{
		{"link", "add", "cable", "netns", a.Name, "type", "veth", "peer", "name", "cable", "netns", b.Name},
	}
	for i, n := range []*namespace.Namespace{a, b} {
		commands = append(commands, []string{"-n", n.Name, "addr", "add", fmt.Sprintf("10.98.0.%d/24", i+1), "dev", "cable"},
			[]string{"-n", n.Name, "link", "set", "cable", "up"})
	}
	for _, c := range commands {
		if out, err := exec.Command("ip", c...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v: %v: %s", c, err, out)
		}
	}
	if limit {
		for _, n := range []*namespace.Namespace{a, b} {
			if out, err := exec.Command("tc", "-n", n.Name, "qdisc", "add", "dev", "cable", "root", "tbf", "rate", "100mbit", "burst", "32kb", "latency", "20ms").CombinedOutput(); err != nil {
				t.Fatalf("tc: %v: %s", err, out)
			}
		}
	}
	return a, b
}
