package conflist

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
)

// fakePlugin is a program that answers VERSION.
func fakePlugin(t *testing.T, dir, name string, versions ...string) {
	t.Helper()
	list, err := json.Marshal(versions)
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\ncat >/dev/null\n[ \"$CNI_COMMAND\" = VERSION ] && echo '{\"cniVersion\": \"0.4.0\", \"supportedVersions\": %s}'\n", list)
	program(t, filepath.Join(dir, name), script)
}

// program writes one that can be run at once: a process that is just being started, by another test, would have the file open for writing.
func program(t *testing.T, path, text string) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// longer is the patience with plugins that are to answer.
const longer = 30 * time.Second

// The chain is what is installed, in versions that all of it serves.
func TestChain(t *testing.T) {
	for _, c := range []struct {
		name      string
		installed map[string][]string
		version   string
		plugins   []string
	}{
		{"alone", map[string][]string{plugin: ours}, "1.1.0", []string{plugin}},
		{"all", map[string][]string{plugin: ours, "portmap": {"0.3.1", "0.4.0", "1.0.0", "1.1.0"}, "bandwidth": {"0.4.0", "1.0.0", "1.1.0"}}, "1.1.0", []string{plugin, "portmap", "bandwidth"}},
		{"an older portmap", map[string][]string{plugin: ours, "portmap": {"0.3.1", "0.4.0", "1.0.0"}}, "1.0.0", []string{plugin, "portmap"}},
		{"a very old one", map[string][]string{plugin: ours, "bandwidth": {"0.3.1", "0.4.0"}}, "0.4.0", []string{plugin, "bandwidth"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := Publisher{Dir: t.TempDir(), BinDir: t.TempDir(), Socket: "/run/x/tulle.sock", Bridge: "pods", patience: longer}
			for name, versions := range c.installed {
				fakePlugin(t, p.BinDir, name, versions...)
			}
			if err := p.Set(t.Context(), true, false); err != nil {
				t.Fatal(err)
			}
			l, err := libcni.ConfListFromFile(filepath.Join(p.Dir, File))
			if err != nil {
				t.Fatal(err)
			}
			if b := string(l.Plugins[0].Bytes); !strings.Contains(b, `"bridge":"pods"`) {
				t.Errorf("the plugin's configuration is %s, without the bridge", b)
			}
			var have []string
			for _, e := range l.Plugins {
				have = append(have, e.Network.Type)
			}
			if l.Name != network || l.CNIVersion != c.version || !slices.Equal(have, c.plugins) {
				t.Errorf("an engine reads %s, version %s, plugins %v; want %s, %v", l.Name, l.CNIVersion, have, c.version, c.plugins)
			}
		})
	}
}

func TestPublish(t *testing.T) {
	p := Publisher{Dir: t.TempDir()}
	path := filepath.Join(p.Dir, File)
	there := func() bool { _, err := os.Stat(path); return err == nil }
	set := func(ready, again bool) {
		t.Helper()
		if err := p.Set(t.Context(), ready, again); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path, []byte("of an agent that was killed"), 0o600); err != nil {
		t.Fatal(err)
	}
	set(false, false)
	if there() {
		t.Error("an old file stays while the agent is not ready")
	}
	set(true, false)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o644 {
		t.Errorf("not published for everybody: %v %v", st, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	set(true, false)
	if there() {
		t.Error("it was looked at although nothing has changed")
	}
	set(true, true)
	if !there() {
		t.Error("what somebody deleted is not mended")
	}
	set(false, false)
	if left, _ := os.ReadDir(p.Dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestProblems(t *testing.T) {
	bin := t.TempDir()
	for _, c := range []struct {
		name string
		p    Publisher
		make func()
		want string
	}{
		{"no directory", Publisher{Dir: filepath.Join(t.TempDir(), "none")}, nil, "none: there is no such directory"},
		{"plugin not installed", Publisher{Dir: t.TempDir(), BinDir: bin}, nil, "install tulle-cni there"},
		{"no version in common", Publisher{Dir: t.TempDir(), BinDir: bin}, func() { fakePlugin(t, bin, plugin, ours...); fakePlugin(t, bin, "portmap", "0.2.0") }, "no version"},
		{"a plugin that fails", Publisher{Dir: t.TempDir(), BinDir: bin}, func() { fakePlugin(t, bin, "portmap") }, "portmap"},
	} {
		if c.make != nil {
			c.make()
		}
		c.p.patience = longer
		err := c.p.Set(t.Context(), true, false)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", c.name, err, c.want)
		}
		if left, _ := os.ReadDir(c.p.Dir); len(left) > 0 {
			t.Errorf("%s: left behind: %v", c.name, left)
		}
	}
	if err := (&Publisher{}).Set(t.Context(), true, true); err != nil {
		t.Errorf("off: %v", err)
	}
}

// A plugin that hangs, itself or as a process of a script, does not hold the agent up; one that has answered is not asked again.
func TestSlowPlugin(t *testing.T) {
	answer := `echo '{"cniVersion": "0.4.0", "supportedVersions": ["0.4.0", "1.0.0"]}'`
	for name, c := range map[string]struct{ script, want string }{
		"the program hangs":              {"exec sleep 90", "portmap for its versions: no answer within 2s"},
		"a process of a script hangs":    {"sleep 90; " + answer, "portmap for its versions: no answer within 2s"},
		"a process of it stays":          {"sleep 90 & " + answer, ""},
		"a failure with its reason":      {`echo '{"code": 100, "msg": "no such thing"}'; exit 1`, "no such thing"},
		"it is asked once":               {"[ ! -e $0.asked ] || exit 1; touch $0.asked; " + answer, ""},
		"a failure is tried again later": {"[ -e $0.asked ] || { touch $0.asked; exit 1; }; " + answer, "exit status 1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := Publisher{Dir: t.TempDir(), BinDir: t.TempDir(), patience: longer}
			if strings.Contains(c.want, "no answer") {
				p.patience = 0
			}
			fakePlugin(t, p.BinDir, plugin, ours...)
			program(t, filepath.Join(p.BinDir, "portmap"), "#!/bin/sh\n"+c.script+"\n")
			done := make(chan error, 1)
			set := func() error {
				t.Helper()
				go func() { done <- p.Set(t.Context(), true, true) }()
				select {
				case err := <-done:
					return err
				case <-time.After(60 * time.Second):
					t.Fatal("the agent waits for the plugin")
					return nil
				}
			}
			if err := set(); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if c.want == "" || strings.Contains(name, "later") {
				if err := set(); err != nil {
					t.Errorf("the second time: %v", err)
				}
			}
		})
	}
}
