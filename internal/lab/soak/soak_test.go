package soak

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) }

// healing is how long a cluster may take to be as before after a fault has ended.
const healing = 60 * time.Second

// seedOfShort is the seed of the run without TULLE_SOAK, which is the same each time.
const seedOfShort = 1

// calm is how long nothing happens after each fault, and so no datagram may be lost.
const calm = time.Second

// schedule is what a run does.
type schedule struct {
	length time.Duration // further rounds begin until then; 0: one round, of each kind of fault one
	seed   uint64
}

func readSchedule(t *testing.T) (s schedule) {
	t.Helper()
	s.seed = seedOfShort
	if text := os.Getenv("TULLE_SOAK"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil || d <= 0 {
			t.Fatalf("TULLE_SOAK=%q: want a time such as 1h", text)
		}
		s.length, s.seed = d, uint64(time.Now().UnixNano())
	}
	if text := os.Getenv("TULLE_SOAK_SEED"); text != "" {
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("TULLE_SOAK_SEED=%q: %v", text, err)
		}
		s.seed = n
	}
	return s
}

func TestSoak(t *testing.T) {
	plan := readSchedule(t)
	if testing.Short() && plan.length == 0 {
		t.Skip("takes a minute and more: not with -short")
	}
	t.Logf("TULLE_SOAK_SEED=%d", plan.seed)
	c := newCluster(t, rand.New(rand.NewPCG(plan.seed, 1)))
	c.long = plan.length > 0
	c.heal("start", time.Now())
	r := newReport(plan)
	r.sizes = append(r.sizes, c.sizes())
	t.Cleanup(func() { r.write(t, c.traffic) })
	began := time.Now()
	for round := 0; round == 0 || time.Since(began) < plan.length; round++ { // each kind as often as the others
		order := slices.Clone(faults)
		c.rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, f := range order {
			if round > 0 && time.Since(began) >= plan.length {
				break
			}
			c.suffer(f, r)
		}
		r.length = time.Since(began)
	}
	r.sizes = append(r.sizes, c.settled(r.sizes[0]))
	c.traffic.end()
}

// suffer breaks one machine, mends it, and checks that the cluster heals and that nothing is lost then.
func (c *cluster) suffer(f fault, r *report) {
	c.t.Helper()
	among := c.machines
	if f.ends {
		among = among[:len(among)-1] // the last machine's agent lives as long as the run, so that it would show growth
	}
	m := among[c.rand.IntN(len(among))]
	name := f.name + " of " + m.Name
	mend := f.inject(c, m)
	lasts := time.Duration(500+c.rand.IntN(3000)) * time.Millisecond
	if c.long && c.rand.IntN(6) == 0 { // gossip and data path have declared things dead by then
		lasts = time.Duration(10+c.rand.IntN(25)) * time.Second
		name += fmt.Sprintf(" for %v", lasts)
	}
	time.Sleep(lasts)
	mend()
	flowing, whole := c.heal(name, time.Now())
	r.healed[f.name] = append(r.healed[f.name], healed{flowing, whole})
	sent, lost, worst := c.traffic.quiet(calm)
	r.calmSent, r.calmLost = r.calmSent+sent, r.calmLost+lost
	// An agent may conclude from probes that were lost before the end of such a fault that the MTU is smaller. Then the datagram
	// by which a pod's kernel learns it (RFC 1191) is lost, one for each pair.
	allowed := uint64(0)
	if strings.HasPrefix(f.name, "MTU") {
		allowed = 1
	}
	text := fmt.Sprintf("after %s had healed, %d of %d datagrams were lost, by one pair at most %d", name, lost, sent, worst)
	if worst > allowed {
		c.t.Error(text)
	} else if lost > 0 {
		c.t.Log(text)
	}
	c.sound(name)
}

// heal waits until every pod hears every other again, and then until every agent is ready and without problems.
func (c *cluster) heal(name string, since time.Time) (flowing, whole time.Duration) {
	c.t.Helper()
	hosts.Within(c.t, healing, "healed: "+name, func() error {
		if err := c.traffic.flows(since.Add(every)); err != nil {
			return err
		}
		if flowing == 0 {
			flowing = time.Since(since)
		}
		for _, m := range c.machines {
			st, err := m.agent.TryStatus()
			if err != nil {
				return fmt.Errorf("%s: %w", m.Name, err)
			}
			if !st.Ready || st.Cluster.Alive != len(c.machines) {
				return fmt.Errorf("%s: ready %v, %d members alive: %s", m.Name, st.Ready, st.Cluster.Alive, m.agent.Problems())
			}
			if p := m.agent.Problems(); p != "" {
				return fmt.Errorf("%s: %s", m.Name, p)
			}
		}
		return nil
	})
	return flowing, time.Since(since)
}
