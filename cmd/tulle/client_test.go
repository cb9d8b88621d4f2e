package main

import (
	"bytes"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// An agent that is stuck takes connections and never answers. A command that may take minutes tells so as soon as one that takes seconds.
func TestStuckAgent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	for _, line := range []string{"keys list", "ping node-b"} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			var out bytes.Buffer
			cmd := rootCommand()
			cmd.SetOut(&out)
			cmd.SetErr(&out)
			cmd.SetArgs(append(strings.Fields(line), "--socket", socket))
			err := cmd.ExecuteContext(t.Context())
			if took := time.Since(began); err == nil || !strings.Contains(err.Error(), "did not answer in time") || took > quickTimeout+20*time.Second {
				t.Errorf("after %v: %v", took, err)
			}
		})
	}
}
