package agent

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tulle-net/tulle/internal/ownership"
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
			time.Sleep(refusalEvery)
		}
		for kind, want := range map[string]int{"message about address space refused": 3, "another member's table was not taken": 3, "more=1999": 2, "more=999": 2} {
			if n := strings.Count(out.String(), kind); n != want {
				t.Errorf("%d lines with %q, want %d:\n%s", n, kind, want, out.String())
			}
		}
	})
}
