package api

import (
	"bufio"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newReader(r io.Reader) *bufio.Reader { return bufio.NewReader(r) }

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tulle")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestListenModes(t *testing.T) {
	path := filepath.Join(shortDir(t), "a", "s")
	old := unix.Umask(0) // the worst case
	l, err := Listen(path)
	unix.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != fs.ModeSocket|0o660 {
		t.Errorf("the socket is %v, %v", info.Mode(), err)
	}
	if info, err := os.Stat(filepath.Dir(path)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the directory is %v, %v", info.Mode(), err)
	}
	names, _ := filepath.Glob(path + "*")
	if len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
	if l.Addr().String() != path {
		t.Errorf("address %v", l.Addr())
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err == nil {
		t.Error("the socket outlives its listener")
	}
}

func TestListenOverOthers(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "s")

	live, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another agent") || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("over a live agent: %v", err)
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the live agent lost its socket: %v", err)
	} else {
		c.Close()
	}

	// A killed agent: its file stays, nobody listens.
	live.(*listener).UnixListener.Close()
	next, err := Listen(path)
	if err != nil {
		t.Fatalf("over a dead agent's socket: %v", err)
	}
	// The old one, closed late, leaves its successor's socket alone.
	live.Close()
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the new agent lost its socket: %v", err)
	} else {
		c.Close()
	}
	next.Close()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("over a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("the file was touched")
	}
	if _, err := Listen(filepath.Join(path, "s")); err == nil || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("below a file: %v", err)
	}
	if _, err := Listen("/tmp/" + strings.Repeat("x", 100)); err == nil || !strings.Contains(err.Error(), "the limit is 96") {
		t.Errorf("with a long path: %v", err)
	}
}

// In the sandbox of the unit a directory outside /run is read-only, though its file system is not.
func TestListenReadOnly(t *testing.T) {
	err := &os.PathError{Op: "remove", Path: "/srv/s", Err: unix.EROFS}
	if got := placeRemedy("/srv", err); !strings.Contains(got, "--socket") || !strings.Contains(got, "ReadWritePaths=/srv ") {
		t.Error(got)
	}
}

// Of many that start at once over a dead agent's socket, one wins and keeps it.
func TestListenRace(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	dead, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*listener).UnixListener.Close()

	var wg sync.WaitGroup
	won := make(chan net.Listener, 8)
	for range cap(won) {
		wg.Go(func() {
			if l, err := Listen(path); err == nil {
				won <- l
			}
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Fatalf("%d listeners", len(won))
	}
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the winner is not reachable: %v", err)
	} else {
		c.Close()
	}
	(<-won).Close()
}

// An agent that was killed a moment ago may still have its socket: its successor waits until it has ended.
func TestListenOverAnEndingAgent(t *testing.T) {
	if path := os.Getenv("TULLE_TEST_LISTEN"); path != "" { // the agent
		l, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		time.Sleep(time.Minute)
		return
	}
	// A machine that stands still may need longer than endsWithin to end it: one of several has to be in time.
	for i := range 5 {
		err := listenOverEnding(t)
		if err == nil {
			return
		}
		t.Logf("attempt %d: %v", i+1, err)
	}
	t.Error("a successor does not wait until an agent has ended")
}

// listenOverEnding listens at the path of an agent that is killed a moment later.
func listenOverEnding(t *testing.T) error {
	t.Helper()
	path := filepath.Join(shortDir(t), "s")
	cmd := exec.Command(os.Args[0], "-test.run=^TestListenOverAnEndingAgent$")
	cmd.Env = append(os.Environ(), "TULLE_TEST_LISTEN="+path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill(); <-ended })
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if _, err := Listen(path); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("over a live agent: %v", err)
	}
	defer func(was time.Duration) { endsWithin = was }(endsWithin)
	endsWithin = 20 * time.Second // what is killed on a busy machine ends late
	time.AfterFunc(200*time.Millisecond, func() { cmd.Process.Kill() })
	l, err := Listen(path)
	if err != nil {
		return err
	}
	return l.Close()
}
