package clustertest

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
)

// TestCNIKill: containers come and go, 16 at a time, while plugin and agent get SIGKILL at random moments. Nothing is leaked:
// no address, link, chain or record. TULLE_CNI_CYCLES sets how many containers there are.
func TestCNIKill(t *testing.T) {
	t.Parallel()
	cycles := 80
	if s := os.Getenv("TULLE_CNI_CYCLES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		cycles = n
	}
	e := newEngine(t, "cnikill", -1)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)

	ctx, stop := context.WithCancel(t.Context())
	var killer, workers sync.WaitGroup
	kills := 0
	killer.Go(func() { kills = e.killAgents(ctx, rand.New(rand.NewPCG(seed, 1))) })
	var next, added, killed atomic.Int32
	for w := range 16 {
		workers.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)+2))
			for int(next.Add(1)) <= cycles {
				e.cycle(rnd, &added, &killed)
			}
		})
	}
	workers.Wait()
	stop()
	killer.Wait()
	t.Logf("%d containers, %d of them wired, %d plugins killed, %d agents killed", cycles, added.Load(), killed.Load(), kills)
	if added.Load() == 0 || killed.Load() == 0 || kills == 0 {
		t.Error("the test has not done what it is for")
	}
	e.restartAgent() // it honours the records that are left
	// The agent may have answered an ADD whose plugin was dead, behind its DEL: that is what GC is for.
	t.Logf("before GC: %d pods", len(e.pods()))
	err := e.onHost(func(ctx context.Context) error {
		return e.lib.GCNetworkList(ctx, e.network("1.1.0"), &libcni.GCArgs{})
	})
	if err != nil {
		t.Errorf("GC: %v", err)
	}
	e.nothingLeft()
	if ids, err := api.Freed(e.socket); err != nil || len(ids) > 0 {
		t.Errorf("records are left: %v %v", ids, err)
	}
}

// cycle is the life of one container. Whatever is killed, the engine's last word is a DEL that succeeds.
func (e *engine) cycle(rnd *rand.Rand, added, killed *atomic.Int32) {
	n, c := e.network("1.1.0"), e.container()
	defer func() { _ = sys.DeleteNetns(c.ContainerID) }()
	verb := func(call func(context.Context) error) error {
		return e.onHost(func(ctx context.Context) error {
			if rnd.IntN(3) == 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(rnd.IntN(150))*time.Millisecond) // ends in SIGKILL
				defer cancel()
			}
			err := call(ctx)
			if ctx.Err() != nil && err != nil {
				killed.Add(1)
			}
			return err
		})
	}
	if verb(func(ctx context.Context) error { _, err := e.lib.AddNetworkList(ctx, n, c); return err }) == nil {
		added.Add(1)
	}
	if rnd.IntN(2) == 0 { // the engine removes the namespace first
		if err := sys.DeleteNetns(c.ContainerID); err != nil {
			e.t.Error(err)
		}
	}
	for end := time.Now().Add(patience); ; {
		err := verb(func(ctx context.Context) error { return e.lib.DelNetworkList(ctx, n, c) })
		if err == nil {
			return
		}
		if time.Now().After(end) {
			e.t.Errorf("DEL of %s: %v", c.ContainerID, err)
			return
		}
	}
}

// killAgents kills h1's agent and starts it again, until ctx ends. It returns how often.
func (e *engine) killAgents(ctx context.Context, rnd *rand.Rand) (n int) {
	for {
		select {
		case <-ctx.Done():
			return n
		case <-time.After(time.Duration(200+rnd.IntN(1500)) * time.Millisecond):
		}
		e.restartAgent()
		n++
	}
}

func (e *engine) restartAgent() {
	ctx := e.t.Context()
	if err := e.l.StopAgent(ctx, "h1", syscall.SIGKILL); err != nil {
		e.t.Error(err)
	}
	if err := e.l.StartAgent(ctx, "h1"); err != nil {
		e.t.Error(err)
	}
	if err := e.l.WaitReady(ctx, "h1"); err != nil {
		e.t.Error(err)
	}
}
