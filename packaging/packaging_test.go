// Package packaging_test checks what is installed on hosts: the unit against systemd's own tools, the drop-ins against the
// defaults of the configuration. internal/config checks tulle.yaml; internal/lab/nspawn boots hosts with the unit.
package packaging_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
)

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// needs skips where a tool is missing; TULLE_NSPAWN=1, which asks for all tests of systemd and the package, makes that a failure.
func needs(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err != nil {
		if os.Getenv("TULLE_NSPAWN") == "1" {
			t.Fatalf("needs %s: make deps", tool)
		}
		t.Skipf("needs %s: make deps", tool)
	}
}

// systemd understands every line of the unit.
func TestUnitIsUnderstood(t *testing.T) {
	needs(t, "systemd-analyze")
	// The program has to exist for systemd-analyze: a copy of the unit names one that does.
	dir := t.TempDir()
	unit := strings.ReplaceAll(read(t, "tulle.service"), "/usr/bin/tulle", "/bin/true")
	path := filepath.Join(dir, "tulle.service")
	if err := os.WriteFile(path, []byte(unit), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", path).CombinedOutput()
	if err != nil || strings.Contains(string(out), "tulle.service") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// The sandbox stays as tight as it is documented.
func TestUnitIsTight(t *testing.T) {
	needs(t, "systemd-analyze")
	out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--no-pager", "./tulle.service").CombinedOutput()
	m := regexp.MustCompile(`Overall exposure level for tulle.service: ([0-9.]+) `).FindSubmatch(out)
	if m == nil {
		t.Fatalf("systemd-analyze security: %v\n%s", err, out)
	}
	if got, _ := strconv.ParseFloat(string(m[1]), 64); got > 2.5 {
		t.Errorf("exposure is %v, was 2.4:\n%s", got, out)
	}
}

// What the design asks of the unit, and what keeps the sandbox from getting in the agent's way.
func TestUnitLines(t *testing.T) {
	lines := strings.Split(read(t, "tulle.service"), "\n")
	has := map[string]bool{}
	for _, l := range lines {
		has[l] = true
	}
	for _, want := range []string{"Type=notify", "Restart=always", "StartLimitIntervalSec=0", "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_RAW",
		"DeviceAllow=/dev/net/tun rw", "StateDirectory=tulle", "RuntimeDirectory=tulle", "RuntimeDirectoryPreserve=yes",
		"ProtectSystem=strict", "ProtectKernelTunables=yes", "ReadWritePaths=/proc/sys/net", "ReadWritePaths=/etc/tulle"} {
		if !has[want] {
			t.Errorf("tulle.service lacks %q", want)
		}
	}
	for _, l := range lines {
		for _, bad := range []string{"PrivateDevices=", "ProtectProc=", "ProcSubset=", "PrivateNetwork=", "RestartPreventExitStatus="} {
			if strings.HasPrefix(l, bad) {
				t.Errorf("%q: would hide the TUN, pods' namespaces or the network from the agent, or keep it down after a crash (exit status 2)", l)
			}
		}
	}
	if !strings.Contains(strings.Join(lines, "\n"), "\nWatchdogSec=") || !strings.Contains(strings.Join(lines, "\n"), "\nFileDescriptorStoreMax=") {
		t.Error("tulle.service has no watchdog or no file descriptor store")
	}
}

// Every drop-in is about tun0, the default device, and says where it belongs; the README has them all.
func TestDropIns(t *testing.T) {
	readme := read(t, "README.md")
	names, err := filepath.Glob("*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if name == "README.md" || name == "build" || name == "deb" || name == "grafana" || name == "prometheus" || strings.HasSuffix(name, ".go") {
			continue
		}
		if !strings.Contains(readme, "| `"+name+"` |") || !strings.Contains(readme, "packaging/"+name+" ") {
			t.Errorf("README.md does not say where %s goes, and how", name)
		}
		if !strings.HasPrefix(name, "90-") && !strings.HasPrefix(name, "05-") {
			continue
		}
		text := read(t, name)
		place := regexp.MustCompile("\\| `" + regexp.QuoteMeta(name) + "` \\| `([^`]+)` \\|").FindStringSubmatch(readme)
		if place == nil || !strings.HasPrefix(text, "# "+place[1]+"\n") {
			t.Errorf("%s does not begin with its place on the host as README.md has it: %v", name, place)
		}
		if name != "90-tulle.networkd.conf" && !strings.Contains(text, "tun0") {
			t.Errorf("%s does not name tun0", name)
		}
	}
}

// Each sysctl of the drop-in is one that the kernel has, for a device that every host has in tun0's place.
func TestSysctlNames(t *testing.T) {
	for line := range strings.Lines(read(t, "90-tulle.sysctl.conf")) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(strings.TrimPrefix(line, "-"), " = ")
		if _, err := strconv.Atoi(value); !ok || err != nil {
			t.Errorf("%q is not of the form name = number", line)
		}
		path := "/proc/sys/" + strings.ReplaceAll(strings.ReplaceAll(name, ".tun0.", ".lo."), ".", "/")
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%q: %v", line, err)
		}
	}
}

// Debian's own checker has nothing to say about the package that is built here; what is overridden has its reason in
// deb/lintian-overrides.
func TestLintian(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the package")
	}
	needs(t, "lintian")
	needs(t, "dpkg-deb")
	cmd := exec.Command("./build", "deb", runtime.GOARCH)
	cmd.Env, cmd.Stderr = append(os.Environ(), "VERSION=1.0.0", "OUT="+t.TempDir()), t.Output()
	deb, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("lintian", "--allow-root", "--display-info", "--fail-on", "error,warning,info", strings.TrimSpace(string(deb))).CombinedOutput()
	if tags := strings.TrimSpace(regexp.MustCompile("(?m)^running with root .*$").ReplaceAllString(string(out), "")); err != nil || tags != "" {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}
