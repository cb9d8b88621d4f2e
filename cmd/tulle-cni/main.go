// Command tulle-cni is Tulle's plugin for container engines, which run it for each container: those that speak the Container Network
// Interface (containerd, CRI-O, kubelet, Nomad, podman 4), and podman 5, whose netavark calls its plugins with a command as argument.
// See docs/kubernetes.md and docs/podman.md, and internal/cni and internal/netavark for what it does.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/tulle-net/tulle/internal/cni"
	"github.com/tulle-net/tulle/internal/netavark"
)

func main() {
	if args := os.Args[1:]; netavark.IsCall(args) {
		os.Exit(netavark.Main(args, os.Stdin, os.Stdout, os.Stderr))
	}
	// After DEL the library compares the container's namespace with this one and fails if they are the same. A path such as
	// /proc/PID/ns/net may lead anywhere once the container is gone, and DEL has to succeed. ADD makes the comparison by itself.
	os.Setenv("CNI_NETNS_OVERRIDE", "TRUE")
	skel.PluginMainFuncs(cni.Funcs(), cni.Versions, cni.About())
}
