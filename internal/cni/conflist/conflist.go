// Package conflist publishes Tulle's network configuration to container engines: the file 10-tulle.conflist in the directory that
// they read (CNI). It is there exactly while the agent can serve them, because older engines know no other sign.
//
// A Publisher belongs to one goroutine.
package conflist

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
)

// File is the name of the file. Engines take the first one in the order of names.
const File = "10-tulle.conflist"

// Names of the plugin and of the network.
const (
	plugin  = "tulle-cni"
	network = "tulle"
)

// ours are the versions of the specification that the plugin serves, oldest first.
var ours = []string{"0.4.0", "1.0.0", "1.1.0"}

// preferred is what engines get that do not choose among several versions; the oldest one if a chained plugin does not know it.
const preferred = "1.0.0"

// chained are plugins that are run after ours where they are installed.
var chained = []entry{
	{Type: "portmap", Capabilities: map[string]bool{"portMappings": true}, SNAT: true},
	{Type: "bandwidth", Capabilities: map[string]bool{"bandwidth": true}},
}

type entry struct {
	Type         string          `json:"type"`
	Socket       string          `json:"socket,omitempty"`
	Bridge       string          `json:"bridge,omitempty"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	SNAT         bool            `json:"snat,omitempty"`
}

type list struct {
	Version  string   `json:"cniVersion"`
	Versions []string `json:"cniVersions"`
	Name     string   `json:"name"`
	Plugins  []entry  `json:"plugins"`
}

// Publisher keeps the file.
type Publisher struct {
	Dir    string // where engines look; empty: nothing is published
	BinDir string // where their plugins are; empty: not looked at, and nothing is chained
	Socket string // the agent's, for the plugin; empty: the plugin's default
	Bridge string // that pods are behind; empty: none

	patience time.Duration // for what a plugin says of its versions; 0: versionPatience

	known   bool // Set has been called
	ready   bool
	err     error               // of the last attempt
	answers map[string]versions // of chained plugins, by path
}

// versions is what a plugin has answered, and the file that it was then.
type versions struct {
	file fs.FileInfo
	list []string
}

// versionPatience bounds how long a chained plugin may take to say its versions. The agent's loop waits meanwhile.
const versionPatience = 2 * time.Second

// ErrNoDir is wrapped by the error of Set if Dir is not there.
var ErrNoDir = errors.New("there is no such directory")

// Set writes the file, or removes it. If it has tried so before it does nothing and returns the same error, unless again is set:
// then it mends what somebody has changed, and tries again what has failed. The file is exchanged as a whole.
func (p *Publisher) Set(ctx context.Context, ready, again bool) error {
	if p.Dir != "" && (!p.known || p.ready != ready || again) {
		p.known, p.ready, p.err = true, ready, p.set(ctx, ready)
	}
	return p.err
}

func (p *Publisher) set(ctx context.Context, ready bool) error {
	path := filepath.Join(p.Dir, File)
	if ready {
		if err := p.write(ctx, path); err != nil {
			return fmt.Errorf("publish the network to container engines: %w", err)
		}
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("take the network away from container engines: %w", err)
	}
	return nil
}

func (p *Publisher) write(ctx context.Context, path string) error {
	text, err := p.build(ctx)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, text) {
		return nil
	}
	f, err := os.CreateTemp(p.Dir, ".tulle-*") // engines read names that end in conf, conflist or json
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cni_dir %s: %w", p.Dir, ErrNoDir)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func (p *Publisher) build(ctx context.Context) ([]byte, error) {
	l := list{Name: network, Versions: ours, Plugins: []entry{{Type: plugin, Socket: p.Socket, Bridge: p.Bridge, Capabilities: map[string]bool{"ips": true, "mac": true}}}}
	if p.BinDir != "" {
		if _, err := os.Stat(filepath.Join(p.BinDir, plugin)); err != nil {
			return nil, fmt.Errorf("%w: install %s there, or correct cni_bin_dir", err, plugin)
		}
		for _, c := range chained {
			theirs, err := p.versionsOf(ctx, c.Type)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			l.Versions = slices.DeleteFunc(slices.Clone(l.Versions), func(v string) bool { return !slices.Contains(theirs, v) })
			l.Plugins = append(l.Plugins, c)
		}
	}
	if len(l.Versions) == 0 {
		return nil, fmt.Errorf("the plugins in %s have no version of the specification in common with %v", p.BinDir, ours)
	}
	if l.Version = preferred; !slices.Contains(l.Versions, preferred) {
		l.Version = l.Versions[0]
	}
	text, err := json.MarshalIndent(l, "", "  ")
	return append(text, '\n'), err
}

// versionsOf asks a plugin which versions of the specification it serves. It asks again only if the file is another one.
func (p *Publisher) versionsOf(ctx context.Context, name string) ([]string, error) {
	path := filepath.Join(p.BinDir, name)
	file, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if v, ok := p.answers[path]; ok && os.SameFile(v.file, file) && v.file.ModTime().Equal(file.ModTime()) && v.file.Size() == file.Size() {
		return v.list, nil
	}
	limit := cmp.Or(p.patience, versionPatience)
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	info, err := invoke.GetVersionInfo(ctx, path, &impatient{limit: limit, DefaultExec: &invoke.DefaultExec{RawExec: &invoke.RawExec{}, PluginDecoder: version.PluginDecoder{}}})
	if err != nil {
		return nil, fmt.Errorf("ask %s for its versions: %w", path, err)
	}
	if p.answers == nil {
		p.answers = map[string]versions{}
	}
	p.answers[path] = versions{file, info.SupportedVersions()}
	return info.SupportedVersions(), nil
}

// impatient runs a plugin, and does not wait for processes that the plugin has left with its output open, as one that is killed does when
// it is a script.
type impatient struct {
	*invoke.DefaultExec
	limit time.Duration
}

func (i *impatient) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	c := exec.CommandContext(ctx, path)
	c.Stdin, c.Env, c.WaitDelay = bytes.NewReader(stdin), env, 100*time.Millisecond
	out, err := c.Output()
	switch {
	case errors.Is(err, exec.ErrWaitDelay):
		return out, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("no answer within %v", i.limit)
	case err != nil && len(out) > 0: // CNI has it tell the reason there
		return nil, fmt.Errorf("%w: %.200s", err, bytes.TrimSpace(out))
	}
	return out, err
}
