package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"slices"

	"github.com/vishvananda/netlink"

	"github.com/tulle-net/tulle/internal/sys"
)

// madeHere is the alias of lo in network namespaces that NewNetns has made.
const madeHere = "tulle-pod"

// NetnsPath is where the network namespace of that name is.
func NetnsPath(name string) string { return sys.NetnsPath(name) }

// NewNetns makes a named network namespace for a pod, which DropNetns removes.
func NewNetns(name string) error {
	if err := sys.NewNetns(name); err != nil {
		return err
	}
	err := onLoopback(name, func(n *sys.Netlink, lo netlink.Link) error { return n.LinkSetAlias(lo, madeHere) })
	if err != nil {
		return errors.Join(fmt.Errorf("mark the network namespace %s: %w", name, err), sys.DeleteNetns(name))
	}
	return nil
}

// DropNetns removes the network namespace of that name if NewNetns has made it and no pod interface is left in it. It leaves
// others', and says nothing of one that is gone, of which it removes the file.
func DropNetns(name string) error {
	if stale, err := sys.StaleNetns(name); err == nil && stale {
		return sys.DeleteNetns(name)
	}
	ours := false
	err := onLoopback(name, func(n *sys.Netlink, lo netlink.Link) error {
		links, err := n.LinkList()
		wired := slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Type() == "veth" })
		ours = lo.Attrs().Alias == madeHere && !wired
		return err
	})
	if errors.Is(err, fs.ErrNotExist) || err == nil && !ours {
		return nil
	}
	if err != nil {
		return err
	}
	return sys.DeleteNetns(name)
}

func onLoopback(name string, f func(*sys.Netlink, netlink.Link) error) error {
	n, err := sys.OpenNetlink(sys.NetnsPath(name))
	if err != nil {
		return err
	}
	defer n.Close()
	lo, err := n.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo in %s: %w", name, err)
	}
	return f(n, lo)
}

// Exec runs a command in the network namespace at path and returns its exit code.
func Exec(path string, cmd *exec.Cmd) (int, error) {
	if err := sys.WithNetns(path, cmd.Start); err != nil {
		return 0, err
	}
	err := cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return sys.ExitCode(exit), nil
	}
	return 0, err
}
