package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
)

// record is a log that a test can read while it is written.
type record struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.b.Write(p)
}

func (r *record) await(t *testing.T, want string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		r.mu.Lock()
		ok := strings.Contains(r.b.String(), want)
		r.mu.Unlock()
		if ok {
			return
		}
	}
	t.Fatalf("%q never came; the log:\n%s", want, &r.b)
}

// loadConfig reads args as `tulle agent` does, with an empty file.
func loadConfig(t *testing.T, args ...string) config.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "tulle") // short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "tulle.yaml")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := agentCommand()
	if err := cmd.ParseFlags(append(args, "--socket", filepath.Join(dir, "s"))); err != nil {
		t.Fatal(err)
	}
	cfg, err := config.Load(cmd.Flags(), file)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// swapAgent puts a program of the test's in the agent's place.
func swapAgent(t *testing.T, run func(context.Context, config.Config, *slog.Logger) error) {
	old := runAgent
	runAgent = run
	t.Cleanup(func() { runAgent = old })
}

func TestSignals(t *testing.T) {
	swapAgent(t, func(ctx context.Context, cfg config.Config, log *slog.Logger) error {
		l, err := api.Listen(cfg.Socket)
		if err != nil {
			return err
		}
		log.Info("ready")
		return api.NewServer(&fixture{born: time.Now()}, log).Serve(ctx, l)
	})
	cfg := loadConfig(t)
	log := new(record)
	ended := make(chan error)
	go func() { ended <- serve(t.Context(), cfg, newLogger(log, cfg)) }()
	log.await(t, "ready")

	// SIGHUP reloads, and says what needs a restart.
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	log.await(t, "msg=reload key=log_level old=info new=debug")
	log.await(t, `level=WARN msg="reload: this key does not change while the agent runs" key=udp_port old=6080 new=6081 remedy="it counts after `+"`systemctl restart tulle`"+`"`)
	log.await(t, "msg=reloaded changed=1 needs_restart=4")

	// SIGTERM ends it well.
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// A reload that fails is logged, and the agent goes on.
func TestHangupWithoutSocket(t *testing.T) {
	swapAgent(t, func(ctx context.Context, _ config.Config, log *slog.Logger) error {
		log.Info("ready")
		<-ctx.Done()
		return ctx.Err()
	})
	cfg := loadConfig(t)
	log := new(record)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- serve(ctx, cfg, newLogger(log, cfg)) }()
	log.await(t, "ready")
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	log.await(t, `msg="reload failed" error="no agent listens on`)
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("a stop is no failure: %v", err)
	}
}

func TestAgentFails(t *testing.T) {
	broken := errors.New("tun0 is taken; stop the other agent")
	swapAgent(t, func(context.Context, config.Config, *slog.Logger) error { return broken })
	cfg := loadConfig(t)
	if err := serve(t.Context(), cfg, newLogger(new(record), cfg)); err != broken {
		t.Errorf("got %v", err)
	}
}
