// Package namespace gives a test network namespaces of its own, which end with it. Whole hosts with agents are package
// hosts'. For tests only, and for root.
//
// Concurrency: the methods are called from the test's goroutine.
package namespace

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/sys"
)

// Namespace is a network namespace with its loopback device up.
type Namespace struct {
	Name string
	t    testing.TB
}

var serial atomic.Uint32

// New makes a namespace and removes it when the test ends. The test is skipped without root.
func New(t testing.TB) *Namespace {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	n := &Namespace{fmt.Sprintf("tulle-test-%d-%d", os.Getpid(), serial.Add(1)), t}
	if err := sys.NewNetns(n.Name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sys.DeleteNetns(n.Name); err != nil {
			t.Error(err)
		}
	})
	n.Netlink(func(nl *sys.Netlink) error {
		return nl.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: 1, Name: "lo"}})
	})
	return n
}

// Path is the file that names the namespace.
func (n *Namespace) Path() string { return sys.NetnsPath(n.Name) }

// Do runs f on a thread in the namespace and fails the test on its error. Sockets that f makes stay in the namespace.
func (n *Namespace) Do(f func() error) {
	n.t.Helper()
	if err := sys.WithNetns(n.Path(), f); err != nil {
		n.t.Fatal(err)
	}
}

// Netlink runs f with a netlink handle of the namespace, and fails the test on its error.
func (n *Namespace) Netlink(f func(nl *sys.Netlink) error) {
	n.t.Helper()
	n.Do(func() error {
		nl, err := sys.NewNetlink(-1)
		if err != nil {
			return err
		}
		defer nl.Close()
		return f(nl)
	})
}
