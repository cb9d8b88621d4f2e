package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/cni/conflist"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/internal/docker"
	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/seed"
	"github.com/tulle-net/tulle/tunnel/device"
	"github.com/tulle-net/tulle/tunnel/fastpath"
)

// agent has the parts that outlive a session: the control socket, and the status before the first session.
type agent struct {
	cfg     config.Config
	log     *slog.Logger
	started time.Time
	session atomic.Pointer[session]
	seeds   *seed.List
	store   fdStore           // sessions' own
	newID   membership.NodeID // of a node without state, until it has some

	starting pulse // of the start of a session

	conflist *conflist.Publisher // sessions' own

	moved   underlayMove    // the last change of the underlay address; sessions' own
	carried fastpath.Counts // by the fast path in earlier sessions; sessions' own

	mu      sync.Mutex
	pending api.Problem // why there is no session
	reload  func(config.Config) api.ReloadResult
}

// Run runs the agent: it serves the control socket and moves packets until ctx is done, which is not an error. The host's
// routes, TUN device and nft tables stay.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	if err := checkCapabilities("tulle agent"); err != nil {
		return err
	}
	// The packet loops wait without giving up their processor (sys.Poller). Each active flow keeps two of them, and the
	// rest of the agent must not wait for these.
	runtime.GOMAXPROCS(runtime.NumCPU() + 4)
	// Most of the live heap is the packet loops' buffers, which never grow. Go would let garbage take as much again.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50)
	}
	seeds, err := seed.New(cfg.Join, cfg.GossipPort, nil, log)
	if err != nil {
		return err
	}
	seeds.Own(cfg.NodeName)
	a := &agent{cfg: cfg, log: log, started: time.Now(), seeds: seeds, store: openStore(), newID: membership.NewNodeID()}
	listener, err := api.Listen(cfg.Socket)
	if err != nil {
		return err
	}
	var plugin, metrics net.Listener
	if cfg.DockerSocket != "" {
		if plugin, err = api.Listen(cfg.DockerSocket); err != nil {
			return errors.Join(fmt.Errorf("docker_socket: %w", err), listener.Close())
		}
	}
	if cfg.Metrics != "" {
		if metrics, err = listenMetrics(cfg.Metrics); err != nil {
			err = errors.Join(err, listener.Close())
			if plugin != nil {
				err = errors.Join(err, plugin.Close())
			}
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	serve := func(f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil {
				cancel(err)
			}
		})
	}
	serve(func(ctx context.Context) error { return api.NewServer(a, log).Serve(ctx, listener) })
	serve(a.seeds.Run)
	serve(a.watch)
	if plugin != nil {
		driver := docker.New(cfg.Socket, log)
		name := strings.TrimSuffix(filepath.Base(cfg.DockerSocket), ".sock")
		serve(func(ctx context.Context) error { return driver.Run(ctx, plugin, name, cfg.DockerAPI) })
	}
	if metrics != nil {
		serve(func(ctx context.Context) error { return a.serveMetrics(ctx, metrics) })
	}
	// What an agent that was killed has left must not be there before this one is ready, unless engines need it (see publish).
	a.conflist = &conflist.Publisher{Dir: cfg.CNIDir, BinDir: cfg.CNIBinDir, Bridge: cfg.CNIBridge}
	if cfg.Socket != api.DefaultSocket {
		a.conflist.Socket = cfg.Socket
	}
	if err := a.unpublish(ctx); err != nil {
		log.Error("container engines do not see this network as it is", "error", err)
	}
	err = a.sessions(ctx)
	cancel(err)
	wg.Wait()
	if err == nil && !errors.Is(context.Cause(ctx), context.Canceled) {
		err = context.Cause(ctx)
	}
	return nameFileLimit(err)
}

// nameFileLimit adds to the kernel's answer that no more files may be open how many may be, and what to do. Go raises the soft limit to the
// hard one by itself.
func nameFileLimit(err error) error {
	var limit unix.Rlimit
	if !errors.Is(err, unix.EMFILE) || unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return err
	}
	return &api.Error{Code: api.CodeFailed, Message: fmt.Sprintf("%v: this process may have %d open", err, limit.Cur),
		Remedy: "set LimitNOFILE=1024 or more in its unit (ulimit -Hn in a shell)"}
}

// unpublish takes the network of an earlier run away from container engines that have no pods here.
func (a *agent) unpublish(ctx context.Context) error {
	pods, err := podnet.Open("")
	if err != nil {
		return err
	}
	defer pods.Close()
	if ofEngines(pods) {
		return nil
	}
	return a.conflist.Set(ctx, false, false)
}

// sessions runs one session after the other, until ctx is done or one fails.
func (a *agent) sessions(ctx context.Context) error {
	short := 0 // counts sessions in a row that ended soon: of an address that comes and goes, a device that is removed again and again
	pause := func(s *session) {
		if time.Since(s.started) > underlayRetry {
			short = 0
			return
		}
		short = min(short+1, 5)
		select {
		case <-ctx.Done():
		case <-time.After(underlayRetry / 8 << short): // 0.5 to 8 s
		}
	}
	for {
		a.starting.beat()
		s, err := a.start(ctx)
		if ctx.Err() != nil && err != nil {
			return nil
		}
		ran := err == nil
		if ran {
			a.session.Store(s)
			if err = a.configure(s); err == nil { // a reload that has met no session yet
				err = s.run(ctx)
			}
			a.starting.beat()
			a.session.Store(nil)
		}
		change, moves := errors.AsType[*underlayChange](err)
		renamed, renames := errors.AsType[*nameChange](err)
		switch {
		case ctx.Err() != nil && (moves || renames || err == nil || errors.Is(err, device.ErrGone)):
			if ran && s.ownership.Phase() == ownership.Left {
				a.log.Info("stopped; this node has left the cluster")
			} else {
				a.log.Info("stopped; routes and pods stay, this node has not left the cluster")
			}
			return nil
		case renames:
			a.log.Warn("the host has another name, starting again", "old", s.cfg.NodeName, "new", renamed.to.NodeName)
			a.carried = s.fast.total
			a.release(s.tunName())
			a.release(s.socketsName())
			a.rename(renamed.to)
			a.wait(api.Problem{What: err.Error(), Remedy: "wait a moment: the agent starts again"})
		case moves:
			a.log.Warn("the underlay address changes, starting again", "old", s.link.Addrs, "reason", change.why)
			if ran {
				a.carried = s.fast.total
				a.moved = underlayMove{time.Now(), s.link.Addrs, change.why, s.members(), s.moved.both || len(s.link.Addrs) > 1}
			}
			a.release(s.tunName())
			a.release(s.socketsName())
			if err := fastpath.Remove(); err != nil { // it sends from the address that is lost
				a.log.Warn("fast path", "error", err)
			}
			a.wait(api.Problem{What: err.Error(), Remedy: "wait a moment: the agent starts again"})
			pause(s)
		case errors.Is(err, device.ErrGone):
			a.log.Warn("the TUN device was removed, starting again", "tun", a.cfg.Tun)
			a.carried = s.fast.total
			a.release(s.tunName())
			a.release(s.socketsName())
			a.wait(api.Problem{What: "the TUN device " + a.cfg.Tun + " was removed", Remedy: "wait a moment: the agent starts again, and makes it anew"})
			pause(s)
		default:
			return err
		}
	}
}

// A nameChange ends a session: members and seeds know this host by its old name, and the bootstrap node is found by its name.
type nameChange struct{ to config.Config }

func (e *nameChange) Error() string { return "the host's name is " + e.to.NodeName + " now" }

// rename takes over the host's new name.
func (a *agent) rename(to config.Config) {
	a.seeds.Own(to.NodeName)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cfg.NodeName, a.cfg.Bootstrap = to.NodeName, to.Bootstrap
}

// wait records why there is no session.
func (a *agent) wait(p api.Problem) {
	p.Since = time.Now()
	newNotifier(a.log).send("STATUS=" + p.What)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pending = p
}

// checkCapabilities checks for the command what early and in one line what would otherwise fail later in many places.
func checkCapabilities(what string) error {
	const netAdmin, netRaw = 12, 13 // linux/capability.h
	eff, err := effectiveCapabilities()
	if err != nil {
		return err
	}
	if eff&(1<<netAdmin) == 0 || eff&(1<<netRaw) == 0 {
		return &api.Error{Code: api.CodeFailed, Message: what + " needs CAP_NET_ADMIN and CAP_NET_RAW, which this process (uid " + uid() + ") does not have",
			Remedy: "run it as root, or by its systemd unit (systemctl start tulle)"}
	}
	return nil
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "this host"
	}
	return name
}
