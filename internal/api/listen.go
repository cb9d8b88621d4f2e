package api

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketPath leaves space in sun_path (108 bytes, unix(7)) for the terminating zero and for the temporary name of the
// socket.
const maxSocketPath = 96

// Listen creates the control socket with mode 0660, and its directory with mode 0755 if it does not exist. It replaces the
// socket of a dead agent. If an agent listens on the socket, and does not end within a second, it returns an error that says
// so. Closing the listener removes the socket.
func Listen(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("control socket %s: the path is %d bytes long, the limit is %d; name a shorter one with --socket",
			path, len(path), maxSocketPath)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("control socket: %w; %s", err, placeRemedy(dir, err))
	}
	// One agent at a time: no other may come between the check of the old socket and the creation of the new one.
	lock, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("control socket: lock %s: %w", dir, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := listenAt(path)
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w; %s", path, err, placeRemedy(dir, err))
	}
	return l, nil
}

// placeRemedy is what to do about a directory in which no socket can be made.
func placeRemedy(dir string, err error) string {
	if errors.Is(err, unix.EROFS) {
		return fmt.Sprintf("name another place with --socket, such as one in /run; if the file system is writable, the unit forbids it: make %[1]s, and let the service write there with ReadWritePaths=%[1]s (systemctl edit tulle)", dir)
	}
	return "run as root, or name another place with --socket"
}

// removeStale removes the socket at path if nobody listens on it.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("control socket %s: the path exists and is not a socket (%s); remove it or name another path with --socket",
			path, info.Mode())
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	ended := false
	if err == nil {
		ended = ends(conn.(*net.UnixConn), endsWithin)
		conn.Close()
	}
	if !ended && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control socket %s: another agent listens there; stop it (systemctl stop tulle); an agent in another network namespace needs its own --socket and --state-dir", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("control socket: remove the socket of a dead agent: %w", err)
	}
	return nil
}

// listenAt binds under a temporary name, sets the mode, and then links the socket to its real name: nobody can connect to
// it while its mode is that of the umask.
func listenAt(path string) (net.Listener, error) {
	birth := path + "." + strconv.Itoa(os.Getpid())
	if err := os.Remove(birth); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: birth, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer os.Remove(birth)
	made := &listener{UnixListener: l, path: path}
	if err = os.Chmod(birth, 0o660); err == nil {
		if made.inode, err = os.OpenFile(birth, unix.O_PATH|unix.O_NOFOLLOW, 0); err == nil {
			err = os.Link(birth, path) // unlike a rename, never replaces
		}
	}
	if err != nil {
		made.inode.Close()
		l.Close()
		return nil, err
	}
	return made, nil
}

// listener removes the socket on Close if the path is still its own socket. It keeps the inode open, so that the socket of
// another agent cannot get the same inode number.
type listener struct {
	*net.UnixListener
	path  string
	inode *os.File
}

// Addr returns the path of the socket.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

// Close stops listening and removes the socket.
func (l *listener) Close() error {
	if own, err := l.inode.Stat(); err == nil { // fails on a second Close
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, own) {
			os.Remove(l.path)
		}
		l.inode.Close()
	}
	return l.UnixListener.Close()
}

// endsWithin is how long an agent that was killed may take to end. Until then its socket, its devices and its ports are still open.
var endsWithin = time.Second // tests change it

// ends reports whether the process that listens on the other side of a connection ends within a time. When it has, all that it had
// open is closed.
func ends(conn *net.UnixConn, within time.Duration) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	fd := -1
	_ = raw.Control(func(s uintptr) {
		if peer, err := unix.GetsockoptUcred(int(s), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && peer.Pid > 0 && int(peer.Pid) != os.Getpid() {
			fd = pidfd(int(peer.Pid))
		}
	})
	if fd < 0 {
		return false
	}
	defer unix.Close(fd)
	deadline := time.Now().Add(within)
	for left := within; left > 0; left = time.Until(deadline) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if n > 0 || err != nil && err != unix.EINTR {
			return n > 0
		}
	}
	return false
}

// pidfd is a descriptor of a process; -1: there is none.
func pidfd(pid int) int {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1
	}
	return fd
}
