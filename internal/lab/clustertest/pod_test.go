package clustertest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/sys"
)

// TestPodCommand: `tulle pod` from nothing to a ping between hosts, and back; also while the agent is down.
func TestPodCommand(t *testing.T) {
	t.Parallel()
	l := up(t, "pod", lab.Options{Nodes: 2, Pods: 1})
	name := l.Name() + "-web" // network namespaces are the machine's
	h, err := l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sys.DeleteNetns(name) })
	pod := func(args ...string) result {
		return inHost(t, l, "h1", append([]string{"pod", "--socket", h.Socket}, args...)...)
	}
	ok := func(r result) result {
		t.Helper()
		if r.code != 0 {
			t.Fatalf("%+v", r)
		}
		return r
	}
	wanted := freeAddr(t, l, "h1")
	var added struct {
		Addresses []netip.Addr
		MTU       int
	}
	r := ok(pod("add", name, "--new", "--ip", wanted.String(), "-o", "json"))
	if err := json.Unmarshal([]byte(r.out), &added); err != nil || len(added.Addresses) == 0 || added.Addresses[0] != wanted || added.MTU < 1280 {
		t.Fatalf("pod add --ip %v: %v: %s", wanted, err, r.out)
	}
	oneLineError(t, "the same pod again", pod("add", name), 1, "there already")
	oneLineError(t, "a second interface", pod("add", name, "--interface", "eth1"), 1, "one is enough")
	second := name + "2"
	t.Cleanup(func() { _ = sys.DeleteNetns(second) })
	oneLineError(t, "an address that is taken", pod("add", second, "--new", "--ip", wanted.String()), 1, wanted.String())

	far, err := l.Pod("p2a")
	if err != nil {
		t.Fatal(err)
	}
	ok(pod("exec", name, "--", "ping", "-c1", "-w20", far.Addresses[0].String()))
	if r := pod("exec", name, "--", "sh", "-c", "exit 7"); r.code != 7 {
		t.Errorf("exit code of a command: %+v", r)
	}
	if r := ok(pod("list")); !strings.Contains(r.out, name) || !strings.Contains(r.out, wanted.String()) {
		t.Errorf("pod list: %s", r.out)
	}
	oneLineError(t, "no such command", pod("exec", name, "--", "no-such-command"), 127, `this host has no command "no-such-command"`)
	oneLineError(t, "no such command by its path", pod("exec", name, "--", "/no/such"), 127, `this host has no command "/no/such"`)
	oneLineError(t, "no such pod", pod("exec", "nobody", "--", "true"), 1, `no pod "nobody"`)

	ok(pod("del", name))
	ok(pod("del", name)) // again
	gone(t, l, name)

	// Behind a bridge, which no other pod of the host is: all the same.
	ok(pod("add", name, "--new", "--bridge", "pods"))
	ok(pod("exec", name, "--", "ping", "-c1", "-w20", far.Addresses[0].String()))
	oneLineError(t, "somebody else's device", pod("add", second, "--new", "--bridge", "tun0"), 1, "tun0 is a device of somebody else")
	ok(pod("del", name))
	gone(t, l, name)

	// Without the agent: the pod goes, and the agent that comes back gives its addresses back.
	ok(pod("add", name, "--new"))
	if err := l.StopAgent(t.Context(), "h1", syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := ok(pod("del", name)); !strings.Contains(r.out, "the agent does not answer") {
		t.Errorf("pod del without an agent: %+v", r)
	}
	oneLineError(t, "pod add without an agent", pod("add", name, "--new"), 1, "no agent listens")
	if err := l.StartAgent(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	if err := l.WaitReady(t.Context(), "h1"); err != nil {
		t.Fatal(err)
	}
	gone(t, l, name)
}

// gone wants no trace of a pod on h1: neither namespace, nor addresses, nor a record.
func gone(t *testing.T, l *lab.Lab, name string) {
	t.Helper()
	if _, err := os.Stat(sys.NetnsPath(name)); err == nil {
		t.Errorf("the namespace %s is still there", name)
	}
	h, err := l.Host("h1")
	if err != nil {
		t.Fatal(err)
	}
	until(t, name+" is gone", func() error {
		pods, err := api.NewClient(h.Socket).Pods(t.Context())
		for _, p := range pods {
			if p.Name == name || p.State != api.PodUp {
				err = errors.Join(err, fmt.Errorf("pod list: %+v", p))
			}
		}
		if ids, ferr := api.Freed(h.Socket); ferr != nil || len(ids) > 0 {
			err = errors.Join(err, fmt.Errorf("records of pods that are gone: %v %w", ids, ferr))
		}
		return err
	})
}

// freeAddr is an address of a host's block that nobody has had.
func freeAddr(t *testing.T, l *lab.Lab, host string) netip.Addr {
	t.Helper()
	for _, b := range mustStatus(t, l, host).Node.Blocks {
		if b.Prefix.Addr().Is4() {
			a := b.Prefix.Addr().As4()
			a[3] += 77
			return netip.AddrFrom4(a)
		}
	}
	t.Fatal(fmt.Sprintf("%s has no IPv4 block", host))
	return netip.Addr{}
}
