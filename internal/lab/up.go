package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/podnet"
	"github.com/tulle-net/tulle/internal/sys"
)

// Progress receives one short line for each step of Up. It may be nil.
type Progress func(step string)

func (p Progress) say(format string, args ...any) {
	if p != nil {
		p(fmt.Sprintf(format, args...))
	}
}

// Up builds a lab and, unless it is bare, waits until all pods reach each other. It first removes the remains of an incomplete
// lab of that name whose creator is gone. A complete lab of that name is an error, unless Options.Replace is set and its
// creator is gone. If Up fails it removes what it created, unless Options.KeepFailed is set.
func Up(ctx context.Context, o Options, progress Progress) (*Lab, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a lab needs root: it makes network namespaces; run it with sudo")
	}
	if !o.Bare && o.Binary == "" {
		if o.Binary, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	unlock, err := lock(o.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := clearEarlier(ctx, &o, progress); err != nil {
		return nil, err
	}
	l := &Lab{waits: map[process]chan struct{}{}}
	l.st = state{Version: stateVersion, Maker: thisProcess(), Options: o}
	if err := l.build(ctx, progress); err != nil {
		if o.KeepFailed && l.change(func(s *state) { s.Failed = true }) == nil {
			return nil, fmt.Errorf("%w\nthe lab is left as it is, for inspection; `tulle lab down%s` removes it", err, nameFlag(o.Name))
		}
		if derr := remove(context.WithoutCancel(ctx), o.Name); derr != nil {
			err = errors.Join(err, fmt.Errorf("and removing what was made: %w", derr))
		}
		return nil, err
	}
	return l, nil
}

// clearEarlier removes the remains of an earlier lab of the name.
func clearEarlier(ctx context.Context, o *Options, progress Progress) error {
	old, err := loadState(o.Name)
	switch {
	case err != nil: // none, or not readable: remove the remains only
	case old.Whole && !o.Replace:
		return fmt.Errorf("lab %s is up already: `tulle lab down%s` removes it, --name makes another beside it", o.Name, nameFlag(o.Name))
	case old.Whole && old.Maker.alive():
		return fmt.Errorf("lab %s is in use by process %d: wait for that, or choose another --name", o.Name, old.Maker.PID)
	}
	left, err := leftovers(o.Name)
	if err != nil {
		return err
	}
	if left > 0 {
		progress.say("removing what is left of an earlier lab %s", o.Name)
	}
	return clean(ctx, o.Name)
}

// build does the work of Up; the lab's folder is locked.
func (l *Lab) build(ctx context.Context, progress Progress) error {
	o := &l.st.Options
	for n := 1; n <= o.Nodes; n++ {
		l.st.Hosts = append(l.st.Hosts, l.planHost(n, (n-1)%o.Subnets+1))
	}
	if err := l.st.save(); err != nil {
		return err
	}
	progress.say("a router and %s in %s", count(o.Nodes, "host"), count(o.Subnets, "subnet"))
	if err := l.buildRouter(ctx); err != nil {
		return err
	}
	for i := range l.st.Hosts {
		if err := errors.Join(ctx.Err(), l.buildHost(ctx, &l.st.Hosts[i])); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.Timeout, errTimeout{o.Timeout})
	defer cancel()
	if err := l.waitHosts(ctx, l.st.Hosts...); err != nil {
		return err
	}
	if !o.Bare {
		progress.say("an agent on each host")
		for _, h := range l.st.Hosts {
			if err := l.startAgent(h.Name); err != nil {
				return err
			}
		}
		for _, h := range l.st.Hosts {
			if err := l.WaitReady(ctx, h.Name); err != nil {
				return err
			}
		}
	}
	if o.Pods > 0 {
		progress.say("%s on each host", count(o.Pods, "pod"))
	}
	for _, h := range l.st.Hosts {
		for range o.Pods {
			if _, err := l.addPod(ctx, h.Name); err != nil {
				return err
			}
		}
	}
	if !o.Bare && o.Pods > 0 {
		progress.say("waiting until all pods reach each other")
		if err := l.WaitPods(ctx); err != nil {
			return err
		}
	}
	l.st.Whole = true
	return l.st.save()
}

func count(n int, what string) string {
	if n == 1 {
		return "one " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// Open returns an existing lab. An incomplete lab whose creator is gone cannot be opened, only removed with Down. A failed lab
// that was kept can be opened.
func Open(name string) (*Lab, error) {
	st, err := loadState(name)
	if err != nil {
		return nil, err
	}
	if !st.Whole && !st.Failed && !st.Maker.alive() {
		return nil, fmt.Errorf("lab %s was not finished by its maker: `tulle lab down%s` removes it, `tulle lab up%[2]s` makes it anew", name, nameFlag(name))
	}
	return &Lab{st: *st, waits: map[process]chan struct{}{}}, nil
}

// Down removes the lab: agents, namespaces with everything in them, files. It is no error if parts of it are gone already.
func (l *Lab) Down(ctx context.Context) error { return Down(ctx, l.Name()) }

// Down removes the lab of that name, complete or not.
func Down(ctx context.Context, name string) error {
	if !nameRule.MatchString(name) {
		_, err := loadState(name)
		return err
	}
	unlock, err := lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	return remove(ctx, name)
}

// DownIfAbandoned removes a lab whose maker is gone, and says whether it did.
func DownIfAbandoned(ctx context.Context, name string) (bool, error) {
	st, err := loadState(name)
	if err != nil || st.Maker.alive() { // one without a state that can be read is removed by the next Up of its name
		return false, nil
	}
	return true, Down(ctx, name)
}

// remove removes the lab and its folder, which is locked.
func remove(ctx context.Context, name string) error {
	if err := clean(ctx, name); err != nil {
		return err
	}
	if err := os.Remove(labDir(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	_ = os.Remove(runDir) // if this was the last lab
	return nil
}

// namespaces lists the namespaces that the lab of that name has.
func namespaces(name string) ([]string, error) {
	entries, err := os.ReadDir(sys.NetnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if isOurs(name, e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// leftovers counts the things that clean would remove.
func leftovers(name string) (int, error) {
	ns, err := namespaces(name)
	if err != nil {
		return 0, err
	}
	files, err := os.ReadDir(labDir(name))
	return len(ns) + len(files), err
}

// dropPods removes the pods that `tulle pod` has made inside `tulle lab exec` from the host at path, with their namespaces.
func dropPods(path string) error {
	host, err := podnet.Open(path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, sys.ErrNotNetns) {
		return nil // gone
	}
	if err != nil {
		return err
	}
	defer host.Close()
	pods, err := host.List()
	for _, p := range pods {
		if id, ok := api.ParsePodID(p.ID); ok && id.Engine == api.EngineTulle {
			err = errors.Join(err, host.Remove(p.HostInterface), attach.DropNetns(id.Container))
		}
	}
	return err
}

// clean removes everything of a lab except its folder. It finds everything by name and does not need lab.json.
func clean(ctx context.Context, name string) error {
	ns, err := namespaces(name)
	if err != nil {
		return err
	}
	for _, p := range processesIn(name, ns) {
		if p.PID == os.Getpid() {
			continue // `tulle lab exec HOST -- tulle lab down`
		}
		err = errors.Join(err, p.end(ctx, sigKill))
	}
	if err != nil {
		return err
	}
	for _, n := range ns {
		err = errors.Join(err, dropPods(sys.NetnsPath(n)), sys.DeleteNetns(n))
	}
	if err != nil {
		return err
	}
	files, err := os.ReadDir(labDir(name))
	for _, f := range files {
		err = errors.Join(err, os.RemoveAll(filepath.Join(labDir(name), f.Name())))
	}
	return err
}
