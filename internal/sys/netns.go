package sys

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// NetnsDir is the directory of named network namespaces, as in ip-netns(8).
const NetnsDir = "/run/netns"

// NetnsPath returns the path of the namespace with that name.
func NetnsPath(name string) string { return filepath.Join(NetnsDir, name) }

func checkNetnsName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsRune(name, '/') {
		return fmt.Errorf("network namespace name %q: must be a plain file name", name)
	}
	return nil
}

// NewNetns creates a named network namespace, like `ip netns add`, with its loopback
// interface down. If the name exists, the error wraps fs.ErrExist; the empty file of a
// namespace that is gone is used again. The caller's thread stays in its own namespace.
func NewNetns(name string) error {
	if err := checkNetnsName(name); err != nil {
		return err
	}
	if err := prepareNetnsDir(); err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	path := NetnsPath(name)
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer f.Close()
	// Of several callers one mounts; the others see that it has.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("network namespace %s: lock: %w", name, err)
	}
	if stale, err := StaleNetns(name); err != nil || !stale {
		return fmt.Errorf("network namespace %s: %w", name, cmp.Or(err, fs.ErrExist))
	}
	err = onThread(func() (bool, error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return true, fmt.Errorf("unshare: %w", err)
		}
		self := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		return false, unix.Mount(self, path, "", unix.MS_BIND, "")
	})
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

// ErrNotNetns is wrapped by the errors about a path where something else than a network namespace is.
var ErrNotNetns = errors.New("is not a network namespace, as those at /run/netns/NAME and /proc/PID/ns/net are")

// OpenNetns opens the network namespace at path.
func OpenNetns(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.NSFS_MAGIC {
		f.Close()
		return nil, fmt.Errorf("%s %w", path, ErrNotNetns)
	}
	// ioctl_ns(2). Where it is not known (user emulation), setns tells.
	if kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err == nil && kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("%s %w", path, ErrNotNetns)
	}
	return f, nil
}

// StaleNetns reports whether nothing is left of a named network namespace but the empty file that it was mounted on.
func StaleNetns(name string) (bool, error) {
	st, err := os.Lstat(NetnsPath(name))
	if err != nil || !st.Mode().IsRegular() || st.Size() != 0 {
		return false, err
	}
	f, err := OpenNetns(NetnsPath(name))
	if err == nil {
		f.Close()
	} else if errors.Is(err, ErrNotNetns) {
		return true, nil
	}
	return false, err
}

// prepareNetnsDir makes NetnsDir a shared mount, so that other mount namespaces see
// changes of it (like ip-netns(8)).
func prepareNetnsDir() error {
	if err := os.MkdirAll(NetnsDir, 0o755); err != nil {
		return err
	}
	shared := func() error { return unix.Mount("", NetnsDir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err := shared()
	if errors.Is(err, unix.EINVAL) { // not a mount point yet
		if err := unix.Mount(NetnsDir, NetnsDir, "none", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", NetnsDir, err)
		}
		err = shared()
	}
	if err != nil {
		return fmt.Errorf("share %s: %w", NetnsDir, err)
	}
	return nil
}

// DeleteNetns removes a named network namespace. The namespace exists as long as a
// process or a descriptor uses it. A missing name is not an error.
func DeleteNetns(name string) error {
	if err := checkNetnsName(name); err != nil {
		return err
	}
	path := NetnsPath(name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("network namespace %s: unmount: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

// WithNetns runs f on a thread in the network namespace at path (see NetnsPath, or
// /proc/PID/ns/net), and waits for it. Goroutines that f starts are not in that
// namespace. Sockets that f opens stay in it. If the thread cannot return to its own
// namespace, it is discarded and never reused.
func WithNetns(path string, f func() error) error {
	target, err := OpenNetns(path)
	if err != nil {
		return err
	}
	defer target.Close()
	return WithNetnsFD(int(target.Fd()), f)
}

// WithNetnsFD is WithNetns for an open descriptor of a namespace.
func WithNetnsFD(fd int, f func() error) error {
	return onThread(func() (bool, error) {
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return true, fmt.Errorf("open own network namespace: %w", err)
		}
		defer unix.Close(home)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return true, fmt.Errorf("enter network namespace: %w", err)
		}
		err = f()
		return unix.Setns(home, unix.CLONE_NEWNET) == nil, err
	})
}

// onThread runs f on a goroutine locked to its thread. If f returns true, the thread is
// clean and returns to the scheduler. Otherwise, and if f panics or calls
// runtime.Goexit, the thread ends with the goroutine.
func onThread(f func() (clean bool, err error)) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("function ended its goroutine")
		defer func() { done <- err }()
		runtime.LockOSThread()
		clean, e := f()
		err = e
		if clean {
			runtime.UnlockOSThread()
		}
	}()
	return <-done
}
