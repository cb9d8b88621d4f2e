package agent

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
	"github.com/tulle-net/tulle/membership/keyring"
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

// A key file that was changed by hand counts at the next start, and one that is refused would keep the agent from starting: a reload says so.
func TestReloadReadsTheKeyFile(t *testing.T) {
	dir := t.TempDir()
	file, keys := filepath.Join(dir, "tulle.yaml"), filepath.Join(dir, "gossip.key")
	one, two := keyring.Generate(), keyring.Generate()
	write := func(path, text string, mode os.FileMode) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path, []byte(text), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	write(file, "gossip_key_file: "+keys+"\n", 0o600)
	write(keys, one+"\n", 0o600)
	var flags pflag.FlagSet
	config.AddFlags(&flags)
	cfg, err := config.Load(&flags, file)
	if err != nil {
		t.Fatal(err)
	}
	ring, err := keyring.Load(keys)
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{log: slog.New(slog.DiscardHandler), cfg: cfg}
	s := &session{cfg: cfg, log: a.log, clusterSide: clusterSide{keys: ring}}
	a.session.Store(s)
	id := func(text string) string {
		key, err := keyring.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return keyring.FingerprintOf(key).String()
	}
	reload := func(refused string, want ...api.ConfigChange) {
		t.Helper()
		r, err := a.newKeys(a.config())
		if refused != "" {
			if err == nil || !strings.Contains(err.Error(), refused) {
				t.Errorf("%+v, %v; want an error with %q", r, err, refused)
			}
		} else if err != nil || !slices.Equal(r, want) {
			t.Errorf("%+v, %v; want %+v", r, err, want)
		}
	}
	reload("")
	write(keys, "# the same, with a comment\n"+one+"\n", 0o600)
	reload("")
	write(keys, two+"\n"+one+"\n", 0o600)
	reload("", api.ConfigChange{Key: "gossip_key_file", Old: id(one), New: id(two) + "," + id(one)})
	write(keys, two+"\n", 0o644)
	reload("chmod 600")
	if err := os.Remove(keys); err != nil {
		t.Fatal(err)
	}
	reload("copy it from another node")
	if _, err := a.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("a reload without the key file: %v", err)
	}
}
