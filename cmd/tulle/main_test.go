package main

import (
	"context"
	"flag"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
)

var update = flag.Bool("update", false, "write the expected output in testdata anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"tulle": main,
		// The program as it is, around an agent that is nothing but its control socket: for signals and exit codes.
		"tulle-served": func() {
			runAgent = func(ctx context.Context, cfg config.Config, log *slog.Logger) error {
				l, err := api.Listen(cfg.Socket)
				if err != nil {
					return err
				}
				log.Info("serving", "node", cfg.NodeName)
				log.Debug("shown at debug only")
				return api.NewServer(&fixture{born: time.Now()}, log).Serve(ctx, l)
			}
			main()
		},
	})
}

// Each script finds three agents: $OK is at rest, $SICK has problems, $NEW has no cluster yet.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			for name, f := range map[string]*fixture{"OK": {}, "SICK": {sick: true}, "NEW": {young: true}} {
				f.born = time.Now()
				path := filepath.Join(e.WorkDir, strings.ToLower(name)+".sock")
				l, err := api.Listen(path)
				if err != nil {
					return err
				}
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan error)
				go func() { done <- api.NewServer(f, slog.New(slog.DiscardHandler)).Serve(ctx, l) }()
				e.Defer(func() { cancel(); <-done })
				e.Setenv(name, path)
			}
			e.Setenv("COLUMNS", "80")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // with -race each program would end with a second of sleep
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// code N CMD...: runs tulle, wants exit code N.
			"code": cmdCode,
			// await SOCKET: until an agent listens there.
			"await": func(ts *testscript.TestScript, _ bool, args []string) {
				for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
					if c, err := net.Dial("unix", ts.MkAbs(args[0])); err == nil {
						c.Close()
						return
					}
					if time.Now().After(end) {
						ts.Fatalf("nobody listens on %s", args[0])
					}
				}
			},
			// term SOCKET: SIGTERM for the process that listens there (testscript's kill has no such signal).
			"term": func(ts *testscript.TestScript, _ bool, args []string) {
				c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: ts.MkAbs(args[0])})
				ts.Check(err)
				defer c.Close()
				raw, err := c.SyscallConn()
				ts.Check(err)
				ts.Check(raw.Control(func(fd uintptr) {
					peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
					ts.Check(err)
					ts.Check(unix.Kill(int(peer.Pid), unix.SIGTERM))
				}))
			},
			// fits N FILE: no line of FILE is wider than N columns.
			"fits": func(ts *testscript.TestScript, _ bool, args []string) {
				limit := map[string]int{"80": 80, "120": 120}[args[0]]
				for l := range strings.Lines(ts.ReadFile(args[1])) {
					if n := utf8.RuneCountInString(strings.TrimSuffix(l, "\n")); n > limit {
						ts.Fatalf("%d columns: %s", n, l)
					}
				}
			},
			// oneline FILE: it holds one line.
			"oneline": func(ts *testscript.TestScript, _ bool, args []string) {
				if s := ts.ReadFile(args[0]); strings.Count(s, "\n") != 1 {
					ts.Fatalf("want one line, got:\n%s", s)
				}
			},
		},
	})
}

// cmdCode runs a command of which the exit code matters, not only whether it is 0.
func cmdCode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N tulle ARGS...")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := "0"
	if err != nil {
		got = strings.TrimPrefix(err.Error(), "exit status ")
	}
	if got != args[0] {
		ts.Fatalf("exit code %s (%v), want %s", got, err, args[0])
	}
}

// The command's documentation is whole: each has a short text, and its flags have help.
func TestEveryCommandHasHelp(t *testing.T) {
	var out strings.Builder
	if code := run(t.Context(), []string{"help"}, os.Stdin, &out, &out); code != exitOK {
		t.Fatalf("help ends with %d: %s", code, &out)
	}
	for _, c := range rootCommand().Commands() {
		if c.Hidden {
			continue
		}
		if c.Short == "" || c.GroupID == "" {
			t.Errorf("%s: short %q, group %q", c.Name(), c.Short, c.GroupID)
		}
		if !strings.Contains(out.String(), "  "+c.Name()+" ") {
			t.Errorf("help does not name %s", c.Name())
		}
	}
}
