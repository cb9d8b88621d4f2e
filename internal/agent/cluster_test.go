package agent

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/ownership"
	"github.com/tulle-net/tulle/ipam"
	"github.com/tulle-net/tulle/membership"
)

// Whoever sends thousands of bad messages does not fill the log: of each kind there is one line a minute, with their number.
func TestRefusedMessagesInTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		c := &cluster{log: slog.New(slog.NewTextHandler(&out, nil)), outbox: make(chan outgoing, 1)}
		m, err := ownership.New(time.Now(), ownership.Config{ID: membership.NodeID{1}, Name: "a"}, nil, c)
		if err != nil {
			t.Fatal(err)
		}
		c.ownership = m
		for range 3 {
			for range 1000 {
				c.Message(membership.NodeID{2}, []byte{1, 2, 3})
				handler{c}.Broadcast([]byte{1, 2, 3})
				c.MergeState([]byte{1, 2, 3}, true)
			}
			time.Sleep(sparseEvery)
		}
		for kind, want := range map[string]int{"message about address space refused": 3, "another member's table was not taken": 3, "more=1999": 2, "more=999": 2} {
			if n := strings.Count(out.String(), kind); n != want {
				t.Errorf("%d lines with %q, want %d:\n%s", n, kind, want, out.String())
			}
		}
	})
}

// A disk that takes long, as one that is frozen for a snapshot does, is told of in the log: meanwhile nobody gets an answer. Here the file is a pipe that nobody reads at first.
func TestSlowDiskInTheLog(t *testing.T) {
	dir := t.TempDir()
	store, err := ipam.OpenStore(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := store.Load(); !errors.Is(err, ipam.ErrNoState) {
		t.Fatal(err)
	}
	pipe := filepath.Join(dir, "state.tmp")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(slowSave+100*time.Millisecond, func() {
		if f, err := os.Open(pipe); err == nil {
			defer f.Close()
			_, _ = f.Read(make([]byte, 1<<16))
		}
	})
	defer timer.Stop()
	var out bytes.Buffer
	c := &cluster{log: slog.New(slog.NewTextHandler(&out, nil)), store: store}
	_ = c.Persist(&ipam.State{Node: ipam.ID{1}}) // a pipe cannot be synchronised: the error is another matter
	if !strings.Contains(out.String(), "saving the state took long") || !strings.Contains(out.String(), dir) {
		t.Errorf("the log says %q", out.String())
	}
}
