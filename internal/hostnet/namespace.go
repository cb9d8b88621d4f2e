package hostnet

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// namespace is the network namespace that a Reconciler works in. Its netlink
// sockets stay in it by themselves; /proc/sys/net does not: the kernel resolves that
// by the reading thread's namespace (net/sysctl_net.c, net_ctl_header_lookup),
// and a Go program's threads need not agree. So whatever goes by /proc/sys, or opens
// a socket, goes through do.
type namespace struct {
	file *os.File
	id   nsID
}

// nsID is a namespace's identity while it is referenced (namespaces(7)).
type nsID struct{ dev, ino uint64 }

const threadNS = "/proc/thread-self/ns/net"

func currentNamespace() (*namespace, error) {
	f, err := os.Open(threadNS)
	if err != nil {
		return nil, fmt.Errorf("hostnet: open the network namespace: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("hostnet: stat the network namespace: %w", err)
	}
	return &namespace{file: f, id: nsID{uint64(st.Dev), st.Ino}}, nil
}

func (n *namespace) close() error {
	if n == nil {
		return nil
	}
	return n.file.Close()
}

// do runs f on a thread that is in the namespace. An agent's threads all are, and it
// needs no CAP_SYS_ADMIN; elsewhere (the lab, tests) another thread enters it.
func (n *namespace) do(f func() error) error {
	runtime.LockOSThread()
	var st unix.Stat_t
	if err := unix.Stat(threadNS, &st); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("hostnet: stat the network namespace: %w", err)
	}
	if (nsID{uint64(st.Dev), st.Ino}) == n.id {
		defer runtime.UnlockOSThread()
		return f()
	}
	runtime.UnlockOSThread()
	return sys.WithNetnsFD(int(n.file.Fd()), f)
}
