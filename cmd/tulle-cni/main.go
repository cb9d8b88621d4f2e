// Command tulle-cni is Tulle's CNI plugin: container engines that speak the Container Network Interface (containerd, CRI-O, kubelet,
// Nomad, podman before version 5) run it for each container. See docs/kubernetes.md, and internal/cni for what it does.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/tulle-net/tulle/internal/cni"
)

func main() {
	// After DEL the library compares the container's namespace with this one and fails if they are the same. A path such as
	// /proc/PID/ns/net may lead anywhere once the container is gone, and DEL has to succeed. ADD makes the comparison by itself.
	os.Setenv("CNI_NETNS_OVERRIDE", "TRUE")
	skel.PluginMainFuncs(cni.Funcs(), cni.Versions, cni.About())
}
