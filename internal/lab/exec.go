package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/sys"
)

// Stdio has the standard streams of a command of Exec. Files are passed to the command directly.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// Exec runs a command in the network namespace of a host, a pod or the router. It returns the exit code, or 128 plus the
// signal that ended the command. The command sees the devices of the namespace in /sys. On a host and in its pods, the default
// control socket is that of the host's agent.
func (l *Lab) Exec(ctx context.Context, target string, argv []string, stdio Stdio) (int, error) {
	path, err := l.netnsOf(target)
	if err != nil {
		return 0, err
	}
	if len(argv) == 0 {
		return 0, errors.New("no command to run")
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio.In, stdio.Out, stdio.Err
	cmd.Env = append(os.Environ(), labEnv+"="+l.Name())
	var binds []Bind
	if dir := l.socketDir(target); dir != "" {
		at := filepath.Dir(api.DefaultSocket)
		if err := os.MkdirAll(at, 0o755); err != nil {
			return 0, err
		}
		binds = append(binds, Bind{dir, at})
	}
	if err := Start(cmd, path, binds...); err != nil {
		return 0, fmt.Errorf("run %s in %s: %w", argv[0], target, err)
	}
	err = cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		return sys.ExitCode(exit), nil
	}
	return 0, err
}

// socketDir returns the folder with the socket of a target's agent; "" for the router.
func (l *Lab) socketDir(target string) string {
	if p, err := l.Pod(target); err == nil {
		target = p.Host
	}
	if h, err := l.Host(target); err == nil && l.hasAgent(&h) {
		return filepath.Dir(h.Socket)
	}
	return ""
}

// Bind makes a file or folder appear at another path for a command. That path must exist.
type Bind struct{ From, At string }

// Start starts a command in the network namespace at path, with private mounts: the /sys of the namespace, and the binds.
// /run/netns stays shared. The caller must wait for the command.
func Start(cmd *exec.Cmd, path string, binds ...Bind) error {
	return sys.WithNetns(path, func() error {
		runtime.LockOSThread() // never unlocked: the thread keeps its private mounts, so it must end with its goroutine
		if err := privateMounts(binds); err != nil {
			return err
		}
		return cmd.Start()
	})
}

// privateMounts gives the calling thread private mounts.
func privateMounts(binds []Bind) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mounts: %w", err)
	}
	// Except this one: a network namespace that the command makes is everybody's, and the host's agent must see it.
	shared, err := unix.OpenTree(unix.AT_FDCWD, sys.NetnsDir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("clone the mount %s: %w", sys.NetnsDir, err)
	}
	defer sys.Close(shared)
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.MoveMount(shared, "", unix.AT_FDCWD, sys.NetnsDir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s: %w", sys.NetnsDir, err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	for _, b := range binds {
		if err := unix.Mount(b.From, b.At, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", b.From, b.At, err)
		}
	}
	return nil
}
