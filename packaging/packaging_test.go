// Package packaging_test checks what is installed on hosts: the unit against systemd's own tools, the drop-ins against the
// defaults of the configuration. internal/config checks tulle.yaml; internal/lab/nspawn boots hosts with the unit.
package packaging_test

import (
	"compress/gzip"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
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
		if name == "90-tulle.networkd.conf" || name == "05-tulle-bridge.network" {
			continue // about no device's name
		}
		if !strings.Contains(text, "tun0") {
			t.Errorf("%s does not name tun0", name)
		}
		// An upgrade replaces what is in /usr/lib.
		if place != nil {
			if own := filepath.Dir(strings.Replace(place[1], "/usr/lib", "/etc", 1)); !strings.Contains(text, "copy this file to "+own+" ") {
				t.Errorf("%s does not say that it is changed by a copy in %s", name, own)
			}
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

// A release candidate sorts below its release, and what comes after a tag above it, as dpkg compares versions.
func TestVersions(t *testing.T) {
	needs(t, "dpkg")
	dir := t.TempDir()
	do := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "VERSION=", "GIT_AUTHOR_NAME=t", "GIT_AUTHOR_EMAIL=t@example.net", "GIT_COMMITTER_NAME=t", "GIT_COMMITTER_EMAIL=t@example.net",
			"GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v\n%s", cmd, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if err := os.Mkdir(filepath.Join(dir, "packaging"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "packaging/build"), []byte(read(t, "build")), 0o755); err != nil {
		t.Fatal(err)
	}
	do("git", "init", "--quiet")
	do("git", "add", ".")
	last := "0"
	for _, tc := range []struct{ tag, want string }{
		{"", `0\.0~git20260102030405\.[0-9a-f]{12}`},
		{"v0.9.0", `0\.9\.0`},
		{"v1.0.0-rc1", `1\.0\.0~rc1`},
		{"", `1\.0\.0~rc1\+1\.g[0-9a-f]+`},
		{"v1.0.0-rc.2", `1\.0\.0~rc\.2`},
		{"v1.0.0", `1\.0\.0`},
		{"", `1\.0\.0\+1\.g[0-9a-f]+`},
		{"v1.0.1", `1\.0\.1`},
	} {
		do("git", "commit", "--quiet", "--allow-empty", "--message=x")
		if tc.tag != "" {
			do("git", "tag", tc.tag)
		}
		got := do("packaging/build", "version")
		if !regexp.MustCompile("^" + tc.want + "$").MatchString(got) {
			t.Errorf("tag %q: version %q, want %s", tc.tag, got, tc.want)
		}
		if err := exec.Command("dpkg", "--compare-versions", got, "gt", last).Run(); err != nil {
			t.Errorf("dpkg sorts %s not above %s: %v", got, last, err)
		}
		last = got
	}
	if err := os.WriteFile(filepath.Join(dir, "packaging/build"), []byte(read(t, "build")+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got := do("packaging/build", "version"); got != "1.0.1+dirty" {
		t.Errorf("with changes: version %q", got)
	}
}

// builtIn is the directory of built, removed at the end.
var builtIn string

// built is the package that is made here, once for all tests.
var built = sync.OnceValues(func() (_ string, err error) {
	if builtIn, err = os.MkdirTemp("", "tulle-packaging"); err != nil {
		return "", err
	}
	cmd := exec.Command("./build", "deb", runtime.GOARCH)
	cmd.Env, cmd.Stderr = append(os.Environ(), "VERSION=1.0.0", "OUT="+builtIn), os.Stderr
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
})

func TestMain(m *testing.M) {
	code := m.Run()
	if builtIn != "" {
		_ = os.RemoveAll(builtIn)
	}
	os.Exit(code)
}

func deb(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("builds the package")
	}
	needs(t, "dpkg-deb")
	deb, err := built()
	if err != nil {
		t.Fatalf("packaging/build deb: %v", err)
	}
	return deb
}

// unpacked is what is in the package.
func unpacked(t *testing.T) string {
	t.Helper()
	deb, dir := deb(t), t.TempDir()
	if out, err := exec.Command("dpkg-deb", "-x", deb, dir).CombinedOutput(); err != nil {
		t.Fatalf("dpkg-deb -x: %v\n%s", err, out)
	}
	return dir
}

// Whoever unpacks the package by hand gets no directory that only root can enter.
func TestModes(t *testing.T) {
	err := filepath.WalkDir(unpacked(t), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if d.IsDir() && info.Mode().Perm() != 0o755 {
			t.Errorf("%s has the mode %v", path, info.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The package's pages lead to each other, and what pages, manual pages and settings name of the repository is there too, by the same path.
func TestPagesLeadSomewhere(t *testing.T) {
	root := unpacked(t)
	doc := filepath.Join(root, "usr/share/doc/tulle")
	there := func(in, path string) {
		t.Helper()
		if _, err := os.Stat(path); err != nil {
			t.Errorf("%s names %s, which is not there", strings.TrimPrefix(in, root), strings.TrimPrefix(path, root))
		}
	}
	link, name := regexp.MustCompile(`\]\(([^)\s#]+)`), regexp.MustCompile(`(?:^|[^\w./])((?:docs|packaging/(?:prometheus|grafana))/[\w./-]+\.(?:md|yaml|json))`)
	links, names := 0, 0
	err := filepath.WalkDir(filepath.Join(root, "usr"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(path, "/bin/") || strings.HasSuffix(path, "/tulle-cni") {
			return err
		}
		text := read(t, path)
		if strings.HasSuffix(path, ".gz") {
			z, err := gzip.NewReader(strings.NewReader(text))
			if err != nil {
				return err
			}
			b, err := io.ReadAll(z)
			if err != nil {
				return err
			}
			text = string(b)
		}
		text = strings.ReplaceAll(text, `\-`, "-") // of manual pages
		if strings.HasSuffix(path, ".md") {
			for _, m := range link.FindAllStringSubmatch(text, -1) {
				if !strings.Contains(m[1], "://") {
					links++
					there(path, filepath.Join(filepath.Dir(path), m[1]))
				}
			}
		}
		for _, m := range name.FindAllStringSubmatch(text, -1) {
			names++
			there(path, filepath.Join(doc, m[1]))
		}
		return nil
	})
	if err != nil || links < 50 || names < 10 {
		t.Errorf("%d links and %d names found: %v", links, names, err)
	}
}

// Debian's own checker has nothing to say about the package that is built here; what is overridden has its reason in
// deb/lintian-overrides.
func TestLintian(t *testing.T) {
	deb := deb(t)
	needs(t, "lintian")
	out, err := exec.Command("lintian", "--allow-root", "--display-info", "--fail-on", "error,warning,info", deb).CombinedOutput()
	if tags := strings.TrimSpace(regexp.MustCompile("(?m)^running with root .*$").ReplaceAllString(string(out), "")); err != nil || tags != "" {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}
