package clustertest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/testbuild"
)

// criSpecs are the tests of critest about networking: all of its part "Networking", and those of other parts in which a pod's network, a port or
// the host's network is what is tested.
var criSpecs = []string{
	"runtime should support DNS config [Conformance]",
	"runtime should support set hostname [Conformance]",
	"runtime should support port mapping with only container port [Conformance]",
	"runtime should support port mapping with host port and container port [Conformance]",
	"runtime should support portforward [Conformance]",
	"runtime should support portforward in host network",
	"runtime should support HostNetwork is true",
	"runtime should support HostNetwork is false",
	"should support network", // of a pod with several containers
}

// The images that critest wants. Of two it lets nobody choose the names; nothing is fetched, all are made here from busybox.
const (
	criPause   = "tulle.test/pause:1"
	criBox     = "tulle.test/box:1"
	criWeb     = "tulle.test/web:1"
	criHTTPD   = "registry.k8s.io/e2e-test-images/httpd:2.4.39-4"
	criHostWeb = "gcr.io/k8s-staging-cri-tools/hostnet-nginx-"
)

// TestCRITest: the Kubernetes project's own tests of container runtimes, those about networking, with a real containerd that finds the network as
// the agent has published it, portmap and bandwidth chained. All must have run and passed, and nothing of their pods remains.
func TestCRITest(t *testing.T) {
	critest := os.Getenv("TULLE_CRITEST")
	if critest == "" {
		t.Skip("TULLE_CRITEST names no critest: run make critest")
	}
	plugins, networks := t.TempDir(), t.TempDir()
	err := testbuild.Command("tulle-cni", filepath.Join(plugins, "tulle-cni"), nil)
	for _, p := range []string{"loopback", "portmap", "bandwidth"} {
		err = errors.Join(err, os.Symlink(filepath.Join(referencePlugins, p), filepath.Join(plugins, p)))
	}
	if err != nil {
		t.Fatal(err)
	}
	l := up(t, "cri", lab.Options{
		Nodes: 1, Pods: -1, ClusterCIDRs: dualCIDRs, ExtraAgentArgs: []string{"--cni-dir", networks, "--cni-bin-dir", plugins},
	})
	settled(t, l)
	m := newCRIMachine(t, l.Hosts()[0], plugins, networks)

	images, report := filepath.Join(m.dir, "images.yaml"), filepath.Join(m.dir, "report.json")
	names := fmt.Sprintf("defaultTestContainerImage: %s\nwebServerTestImage: %s\n", criBox, criWeb)
	if err := os.WriteFile(images, []byte(names), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{
		critest, "--config", os.DevNull, "--runtime-endpoint", "unix://" + m.socket(), "--test-images-file", images,
		"--ginkgo.json-report", report, "--ginkgo.no-color", "--ginkgo.timeout", "3m",
	}
	for _, name := range criSpecs {
		args = append(args, "--ginkgo.focus", regexp.QuoteMeta(name)+"$")
	}
	var out bytes.Buffer
	c := m.command(&out, args...)
	c.Env = append(os.Environ(), "TMPDIR="+m.dir) // it leaves the logs of pods whose tests fail
	if err := c.Run(); err != nil {
		t.Errorf("critest: %v:\n%s", err, out.Bytes())
	}
	checkCRISpecs(t, report)
	until(t, "nothing remains of the pods", func() error {
		pods, err := api.NewClient(m.h.Socket).Pods(t.Context())
		if len(pods) != 0 {
			err = errors.Join(err, fmt.Errorf("there are %+v", pods))
		}
		return err
	})
}

// newCRIMachine starts containerd with its interface for Kubernetes, and gives it the images.
func newCRIMachine(t *testing.T, h lab.Host, plugins, networks string) *machine {
	t.Helper()
	m := startContainerd(t, h, plugins, networks, fmt.Sprintf(`[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true # root without CAP_SYS_RESOURCE may not lower it
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"`, criPause))
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	var links []string
	for _, applet := range []string{"sh", "sleep", "top", "cat", "hostname", "netstat", "httpd"} {
		links = append(links, "bin/"+applet)
	}
	layer := packTar(t, map[string][]byte{"bin/busybox": busybox, "www/index.html": []byte("web\n")}, links...)
	serve := func(port string) []string { return []string{"httpd", "-f", "-v", "-p", port, "-h", "/www"} }
	for name, cmd := range map[string][]string{
		criPause: {"sleep", "inf"}, criBox: {"sh"}, criWeb: serve("80"), criHTTPD: serve("80"), criHostWeb + runtime.GOARCH + ":latest": serve("12003"),
	} {
		if err := m.ctr("-n", "k8s.io", "image", "import", "--snapshotter", "native", imageTar(t, name, layer, cmd...)); err != nil {
			t.Fatal(err)
		}
		until(t, "the interface for Kubernetes knows "+name, func() error {
			list, err := m.ctrOutput("-n", "k8s.io", "image", "list", "name=="+name)
			if err == nil && !strings.Contains(list, "io.cri-containerd.image=managed") {
				err = errors.New(list)
			}
			return err
		})
	}
	return m
}

// calledAt is what critest writes before it fetches a page from a pod or from a port of the host.
var calledAt = regexp.MustCompile(`the IP:port is http://([0-9.]+):`)

// checkCRISpecs reads critest's report: exactly the tests of criSpecs have run, each has passed, and pods were called at addresses of the cluster.
func checkCRISpecs(t *testing.T, report string) {
	t.Helper()
	raw, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	var suites []struct {
		SpecReports []struct {
			LeafNodeType, LeafNodeText, State string
			CapturedGinkgoWriterOutput        string
			Failure                           struct{ Message string }
		}
	}
	if err := json.Unmarshal(raw, &suites); err != nil {
		t.Fatal(err)
	}
	ran, pods := map[string]bool{}, 0
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			if s.LeafNodeType != "It" || s.State == "skipped" {
				continue
			}
			ran[s.LeafNodeText] = true
			if s.State != "passed" {
				t.Errorf("%s: %s: %s\n%s", s.LeafNodeText, s.State, s.Failure.Message, s.CapturedGinkgoWriterOutput)
			}
			for _, at := range calledAt.FindAllStringSubmatch(s.CapturedGinkgoWriterOutput, -1) {
				if a, err := netip.ParseAddr(at[1]); err != nil || !a.IsLoopback() && !dualCIDRs[0].Contains(a) {
					t.Errorf("%s: a pod at %s, want one of %v (%v)", s.LeafNodeText, at[1], dualCIDRs[0], err)
				} else if !a.IsLoopback() {
					pods++
				}
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(ran)), slices.Sorted(slices.Values(criSpecs)); !slices.Equal(got, want) {
		t.Errorf("tests that have run: %q\nwant %q", got, want)
	}
	if pods < 3 {
		t.Errorf("%d pods were called at their own addresses, want 3", pods)
	}
}
