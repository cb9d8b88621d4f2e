package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/attach"
	"github.com/tulle-net/tulle/internal/config"
)

// podTimeout is how long to wait for the agent and the kernel: an allocation may wait for space from another node.
const podTimeout = 30 * time.Second

func podCommand() *cobra.Command {
	c := new(client)
	list := &cobra.Command{
		Use:   "list",
		Short: "The pods of this node, whoever made them",
		Args:  exactly(),
		RunE:  ask(c, func(ctx context.Context, a *api.Client, _ []string) ([]api.Pod, error) { return a.Pods(ctx) }, printPods, nil),
	}
	return c.flags(group("pod", "Connect network namespaces to the pod network", podAdd(c), list, podExec(c), podDel(c)), podTimeout)
}

// podFlags are the flags that say which interface of which pod.
type podFlags struct{ iface string }

func (f *podFlags) add(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVar(&f.iface, "interface", "eth0", "name of the interface in the pod")
	return cmd
}

func (f *podFlags) id(name string) (api.PodID, error) {
	if name == "" || strings.ContainsAny(name, "/ \t\n") {
		return api.PodID{}, usagef("pod name %q: want a name without \"/\" and spaces", name)
	}
	if err := config.CheckInterface(f.iface); err != nil {
		return api.PodID{}, usagef("--interface %w", err)
	}
	return api.PodID{Engine: api.EngineTulle, Network: "tulle", Container: name, Interface: f.iface}, nil
}

// podAdded is what `pod add` prints.
type podAdded struct {
	Name          string       `json:"name"`
	ID            string       `json:"id"`
	Addresses     []netip.Addr `json:"addresses"`
	Netns         string       `json:"netns"`
	Interface     string       `json:"interface"`
	HostInterface string       `json:"host_interface"`
	MTU           int          `json:"mtu"`
}

func podAdd(c *client) *cobra.Command {
	var f podFlags
	var netns, bridge string
	var fresh bool
	var ips []string
	cmd := &cobra.Command{
		Use:   "add NAME",
		Short: "Give a network namespace an interface in the pod network",
		Long: "Give a network namespace an interface with addresses, routes and source checks. Without --netns and --new it is the namespace\n" +
			"that `ip netns` calls NAME. `tulle pod del NAME` takes the interface back.",
		Example: `  tulle pod add web --new
  tulle pod exec web -- ping 10.244.64.1
  tulle pod add db --netns /proc/4711/ns/net --ip 10.244.0.77
  systemd-nspawn -D /srv/web --network-namespace-path=/run/netns/web`,
		Args: exactly("NAME"),
		RunE: ask(c, func(ctx context.Context, _ *api.Client, args []string) (podAdded, error) {
			id, err := f.id(args[0])
			if err != nil {
				return podAdded{}, err
			}
			if fresh && netns != "" {
				return podAdded{}, usagef("--new makes a network namespace, --netns names one: give one of them")
			}
			if err := config.CheckInterface(bridge); bridge != "" && err != nil {
				return podAdded{}, usagef("--bridge %w", err)
			}
			r := attach.Request{Socket: c.socket, ID: id, Name: args[0], Bridge: bridge}
			if r.Netns, err = filepath.Abs(cmp.Or(netns, attach.NetnsPath(args[0]))); err != nil {
				return podAdded{}, err
			}
			for _, s := range ips {
				a, err := netip.ParseAddr(s)
				if err != nil {
					return podAdded{}, usagef("--ip %q is not an IPv4 or IPv6 address", s)
				}
				r.Requested = append(r.Requested, a)
			}
			if err := attach.OnlyOne(ctx, r.Socket, id); err != nil {
				return podAdded{}, err
			}
			return addPod(ctx, r, fresh)
		}, func(p *printer, a podAdded) {
			p.fields([2]string{"pod", a.Name}, [2]string{"addresses", list(a.Addresses, " ")}, [2]string{"namespace", a.Netns},
				[2]string{"interface", fmt.Sprintf("%s, on the host %s, MTU %d", a.Interface, a.HostInterface, a.MTU)})
		}, nil),
	}
	f.add(cmd)
	cmd.Flags().StringVar(&netns, "netns", "", "`PATH` of the network namespace (default: /run/netns/NAME)")
	cmd.Flags().BoolVar(&fresh, "new", false, "make the network namespace /run/netns/NAME; pod del removes it")
	cmd.Flags().StringVar(&bridge, "bridge", "", "put the pod behind the bridge of this `NAME` on this host, which is made if it is not there")
	cmd.Flags().StringArrayVar(&ips, "ip", nil, "`ADDR`ess to have, free and in this node's blocks; one a family")
	return cmd
}

func addPod(ctx context.Context, r attach.Request, fresh bool) (podAdded, error) {
	if fresh {
		err := attach.NewNetns(r.Name)
		if errors.Is(err, fs.ErrExist) {
			return podAdded{}, taken(r.Name, fmt.Errorf("%s is there already", r.Netns), "without --new the pod gets that namespace")
		}
		if err != nil {
			return podAdded{}, denied(err)
		}
	} else if _, err := os.Stat(r.Netns); errors.Is(err, fs.ErrNotExist) {
		return podAdded{}, fmt.Errorf("no network namespace at %s; make it with --new, or name another with --netns", r.Netns)
	}
	res, err := attach.Add(ctx, r)
	if err != nil {
		if fresh {
			err = errors.Join(err, attach.DropNetns(r.Name))
		} else if errors.Is(err, fs.ErrExist) {
			err = taken(r.Name, err)
		}
		return podAdded{}, denied(err)
	}
	return podAdded{
		Name: r.Name, ID: r.ID.String(), Addresses: res.Attachment.Addresses, Netns: r.Netns,
		Interface: r.ID.Interface, HostInterface: res.Attachment.HostInterface, MTU: res.Attachment.MTU,
	}, nil
}

// taken is the error of an addition that finds something of this name; others are more remedies.
func taken(name string, err error, others ...string) error {
	what := strings.TrimSuffix(err.Error(), ": "+fs.ErrExist.Error())
	remedies := append([]string{fmt.Sprintf("`tulle pod del %s` first, or choose another name", name)}, others...)
	return api.Errorf(api.CodeRefused, "%s", what).WithRemedy("%s", strings.Join(remedies, "; "))
}

// denied adds the remedy to the error of a user who may not do this.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return fmt.Errorf("%w; run as root", err)
	}
	return err
}

// podDeleted is what `pod del` prints.
type podDeleted struct {
	Name     string `json:"name"`
	Recorded bool   `json:"recorded"` // the agent did not answer: it gives the addresses back when it runs
}

func podDel(c *client) *cobra.Command {
	var f podFlags
	cmd := &cobra.Command{
		Use:   "del NAME",
		Short: "Take back what `tulle pod add NAME` has made",
		Long: "Take back what `tulle pod add NAME` has made: interface, addresses, and the namespace if it was made with --new.\n" +
			"It works without an agent, too, which then finds a record. What is gone already is no error.",
		Args: exactly("NAME"),
		RunE: ask(c, func(ctx context.Context, _ *api.Client, args []string) (podDeleted, error) {
			id, err := f.id(args[0])
			if err != nil {
				return podDeleted{}, err
			}
			recorded, err := attach.Remove(ctx, c.socket, id)
			return podDeleted{args[0], recorded}, denied(errors.Join(err, attach.DropNetns(args[0])))
		}, func(p *printer, d podDeleted) {
			if d.Recorded {
				p.line("the agent does not answer: it gives the addresses of %s back when it runs", d.Name)
			}
		}, nil),
	}
	return f.add(cmd)
}

func podExec(c *client) *cobra.Command {
	return &cobra.Command{
		Use:   "exec NAME -- COMMAND [ARGUMENT…]",
		Short: "Run a command in a pod's network namespace",
		Long: "Run a command of the host in the network namespace of a pod: by the pod's name, by its container ID, or else of the namespace\n" +
			"that `ip netns` calls so. Without a command it is a shell. The exit code is the command's, and 127 if the host has no such command.",
		Example: "  tulle pod exec web -- ss -tln",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("%s needs the name of a pod; see `%[1]s --help`", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := c.podNetns(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			argv := args[1:]
			if len(argv) == 0 {
				argv = []string{cmp.Or(os.Getenv("SHELL"), "/bin/sh")}
			}
			// Ctrl-C is the command's; it must not end this process before it.
			caught := make(chan os.Signal, 1)
			signal.Notify(caught, os.Interrupt, syscall.SIGQUIT)
			defer signal.Stop(caught)
			run := exec.CommandContext(cmd.Context(), argv[0], argv[1:]...)
			run.Stdin, run.Stdout, run.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			code, err := attach.Exec(path, run)
			return ended(cmd, argv[0], code, denied(err))
		},
	}
}

// ended makes the result of a command that pod exec or lab exec has run their own.
func ended(cmd *cobra.Command, name string, code int, err error) error {
	start, _ := errors.AsType[*fs.PathError](err)
	switch {
	case errors.Is(err, exec.ErrNotFound), start != nil && start.Op == "fork/exec" && errors.Is(err, fs.ErrNotExist):
		fmt.Fprintf(cmd.ErrOrStderr(), "tulle: this host has no command %q\n", name)
		return exitCode(exitNoCommand)
	case err != nil:
		return err
	case code != 0:
		return exitCode(code)
	}
	return nil
}

// podNetns finds a pod's network namespace.
func (c *client) podNetns(ctx context.Context, name string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	pods, err := api.NewClient(c.socket).Pods(ctx)
	found := map[string]bool{}
	for _, p := range pods {
		if p.Netns != "" && (p.Name == name || p.Container == name || len(name) >= 4 && strings.HasPrefix(p.Container, name)) {
			found[p.Netns] = true
		}
	}
	named := attach.NetnsPath(name)
	if _, serr := os.Stat(named); len(found) == 0 && serr == nil && !strings.Contains(name, "/") {
		found[named], err = true, nil
	}
	switch {
	case len(found) == 1:
		for path := range found {
			return path, nil
		}
	case len(found) > 1:
		return "", fmt.Errorf("%q fits %d pods; give the container's ID: see tulle pod list", name, len(found))
	case err != nil:
		return "", err
	}
	return "", api.Errorf(api.CodeNotFound, "no pod %q here, and no network namespace of that name", name).WithRemedy("see tulle pod list")
}

func printPods(p *printer, pods []api.Pod) {
	if len(pods) == 0 {
		p.line("no pods")
		return
	}
	t := table{head: []string{"NAME", "ENGINE", "NETWORK", "CONTAINER", "ADDRESSES", "DROPPED", "STATE"}, right: []bool{5: true}}
	for _, x := range pods {
		container := x.Container
		if len(container) > 12 {
			container = container[:12]
		}
		if x.PodID == (api.PodID{}) {
			container = x.ID
		}
		t.row(orNone(x.Name), orNone(x.Engine), orNone(x.Network), orNone(container), list(x.Addresses, "\n"), count(x.Dropped), x.State)
	}
	p.table(&t)
}
