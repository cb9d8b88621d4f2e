package agent

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Somebody may take the same away from the host four times a second, for ever, or something else each time.
func TestSparseLog(t *testing.T) {
	for name, kind := range map[string]func(i int) string{
		"always the same": func(int) string { return "table" },
		"always another":  func(i int) string { return fmt.Sprint("route ", i) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out bytes.Buffer
				log, sparse := slog.New(slog.NewTextHandler(&out, nil)), new(sparseLog)
				const minutes, each = 60, 240
				for i := range minutes * each {
					sparse.log(log, slog.LevelWarn, kind(i), "repaired", "object", kind(i))
					time.Sleep(sparseEvery / each)
				}
				if n := strings.Count(out.String(), "\n"); n < minutes || n > minutes*(sparseKinds+1) {
					t.Errorf("%d lines in %d minutes", n, minutes)
				}
				if !strings.Contains(out.String(), "more=") {
					t.Error("no line has the number of the others")
				}
				if len(sparse.byKind) > sparseKinds+1 {
					t.Errorf("it remembers %d kinds", len(sparse.byKind))
				}
			})
		})
	}
}
