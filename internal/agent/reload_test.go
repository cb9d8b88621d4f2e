package agent

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/spf13/pflag"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
)

// A level that `tulle log-level` has set ends with a reload, which says so.
func TestReloadEndsLogLevel(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tulle.yaml")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("join: [node-a]\n")
	var flags pflag.FlagSet
	config.AddFlags(&flags)
	cfg, err := config.Load(&flags, file)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{log: slog.New(slog.DiscardHandler), cfg: cfg}
	reload := func(want ...api.ConfigChange) {
		t.Helper()
		r, err := a.Reload(t.Context())
		if err != nil || !slices.Equal(r.Changed, want) || len(r.NeedsRestart) > 0 {
			t.Errorf("%+v, %v; want %+v", r, err, want)
		}
	}
	reload()
	if _, err := a.LogLevel(t.Context(), api.LogLevelRequest{Level: "debug"}); err != nil {
		t.Fatal(err)
	}
	reload(api.ConfigChange{Key: "log_level", Old: "debug", New: "info"})
	reload()
	write("join: [node-a]\nlog_level: warn\n")
	reload(api.ConfigChange{Key: "log_level", Old: "info", New: "warn"})
	reload()
}
