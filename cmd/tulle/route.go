package main

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func routeCommand() *cobra.Command {
	c := new(client)
	get := &cobra.Command{
		Use:   "get ADDR",
		Short: "Show who owns an address, and how packets to it travel now",
		Long: "Show who owns an address, and how packets to it travel now: endpoint, encapsulation, MTU, and why. Of a member's underlay\n" +
			"address it shows how pods' packets travel; those of the host itself take the host's routes.\n" +
			"The exit code is 1 if they would not arrive.",
		Example: "  tulle route get 10.244.7.3",
		Args:    exactly("an address"),
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.RouteAnswer, error) {
			addr, err := netip.ParseAddr(args[0])
			if err != nil || addr.Zone() != "" {
				return api.RouteAnswer{}, usagef("%q is not an IPv4 or IPv6 address", args[0])
			}
			return a.Route(ctx, addr)
		}, printRoute, func(r api.RouteAnswer) bool { return r.Reachable || r.Kind == api.RouteOutside }),
	}
	return c.flags(group("route", "Show where packets go", get), quickTimeout)
}

func printRoute(p *printer, r api.RouteAnswer) {
	reach := "yes"
	switch {
	case r.Kind == api.RouteOutside && r.Encapsulation != "":
		reach = "from pods through tulle, from the host by its own routes"
	case r.Kind == api.RouteOutside:
		reach = "not through tulle"
	case !r.Reachable:
		reach = "NO"
	}
	prefix := ""
	if r.Prefix.IsValid() {
		prefix = fmt.Sprintf("%s, version %d", r.Prefix, r.Version)
	}
	p.fields(
		[2]string{"address", fmt.Sprintf("%s, %s", r.Address, kindText(r.Kind))},
		[2]string{"prefix", prefix},
		[2]string{"owner", orNone(nodeRef(r.Owner))},
		[2]string{"reachable", reach},
		[2]string{"endpoint", endpoint(r.Endpoint)},
		[2]string{"path", r.Encapsulation},
		[2]string{"mtu", mtu(r.MTU)},
		[2]string{"why", r.Why},
	)
}

func kindText(kind string) string {
	switch kind {
	case api.RouteLocal:
		return "on this node"
	case api.RouteRemote:
		return "on another node"
	case api.RouteExternal:
		return "at an external peer"
	case api.RouteOutside:
		return "outside the cluster"
	case api.RouteNone:
		return "owned by nobody that this node knows"
	}
	return kind
}

// endpoint omits the port for an encapsulation without ports.
func endpoint(ap netip.AddrPort) string {
	switch {
	case !ap.IsValid():
		return ""
	case ap.Port() == 0:
		return ap.Addr().String()
	}
	return ap.String()
}
