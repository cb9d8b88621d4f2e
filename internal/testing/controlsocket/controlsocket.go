// Package controlsocket serves the control socket of an agent that is not there, for tests of what asks agents.
package controlsocket

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
)

// Dir is a folder for sockets, which is gone after the test: that of t.TempDir may be too long for their paths (unix(7), 108 bytes).
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tulle")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// Serve answers as b does until the test ends, and returns the socket's path.
func Serve(t testing.TB, b api.Backend) string {
	t.Helper()
	socket := filepath.Join(Dir(t), "s")
	l, err := api.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = api.NewServer(b, slog.New(slog.DiscardHandler)).Serve(ctx, l) })
	t.Cleanup(func() {
		stop()
		wg.Wait()
	})
	return socket
}
