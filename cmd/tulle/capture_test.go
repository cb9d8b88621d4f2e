package main

import (
	"context"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/testing/controlsocket"
)

// flood is an agent whose captures have packets until their reader goes.
type flood struct{ fixture }

func (f *flood) Capture(ctx context.Context, _ api.CaptureRequest, each func(api.CaptureEvent) error) error {
	for ctx.Err() == nil {
		if err := each(api.CaptureEvent{Time: f.born, Point: "from-pods", Reason: "peer_down", Peer: nodeB, Length: 28, Data: echoRequest, Missed: 3}); err != nil {
			return err
		}
	}
	return nil
}

// capturing starts `tulle capture`, and returns when it has shown packets.
func capturing(t *testing.T, b api.Backend, args ...string) (cmd *exec.Cmd, out io.ReadCloser, errs *strings.Builder) {
	t.Helper()
	socket := controlsocket.Serve(t, b)
	errs = new(strings.Builder)
	cmd = exec.Command("tulle", append([]string{"capture", "--socket", socket}, args...)...)
	cmd.Stderr = errs
	var err error
	if out, err = cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	if _, err := io.ReadFull(out, make([]byte, 512)); err != nil { // more than the header of a file
		t.Fatalf("nothing is captured: %v", err)
	}
	return cmd, out, errs
}

// However a capture is ended, it says how much it was and what it missed.
func TestCaptureEnds(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(cmd *exec.Cmd, out io.Closer) error
	}{
		{"Ctrl-C", func(cmd *exec.Cmd, _ io.Closer) error { return cmd.Process.Signal(os.Interrupt) }},
		{"SIGTERM", func(cmd *exec.Cmd, _ io.Closer) error { return cmd.Process.Signal(syscall.SIGTERM) }},
		{"a reader that goes", func(_ *exec.Cmd, out io.Closer) error { return out.Close() }},
	} {
		for _, args := range [][]string{nil, {"-o", "json"}, {"-w", "-"}} {
			cmd, out, errs := capturing(t, &flood{fixture{born: time.Now()}}, args...)
			if err := tc.end(cmd, out); err != nil {
				t.Fatal(err)
			}
			go func() { _, _ = io.Copy(io.Discard, out) }()
			err := cmd.Wait()
			if err != nil || !strings.Contains(errs.String(), " packets captured, 3 missed\n") || !strings.Contains(errs.String(), "raise --rate") {
				t.Errorf("%s, %q: %v\n%s", tc.name, args, err, errs)
			}
		}
	}
}

// A second signal ends a capture whose output nobody takes.
func TestCaptureKilled(t *testing.T) {
	cmd, out, errs := capturing(t, &flood{fixture{born: time.Now()}})
	// It blocks in a write when the pipe is full; how much that is depends on how it was written.
	for waiting, same := 0, 0; same < 100; time.Sleep(5 * time.Millisecond) {
		n, err := unix.IoctlGetInt(int(out.(*os.File).Fd()), unix.TIOCINQ)
		if err != nil {
			t.Fatal(err)
		}
		if same++; n != waiting || n < 16<<10 {
			waiting, same = n, 0
		}
	}
	ended := make(chan error)
	go func() { ended <- cmd.Wait() }()
	for range 200 { // a signal that follows the first one too closely is the same one
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			break
		}
		select {
		case <-ended:
			if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || s.Signal() != syscall.SIGINT {
				t.Errorf("%v\n%s", cmd.ProcessState, errs)
			}
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
	t.Error("it goes on")
}
