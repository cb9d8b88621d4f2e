package nspawn

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// cacheDir keeps the tree between runs: it takes a minute to make.
const cacheDir = "/var/cache/tulle-lab"

// packages are what a host has beyond debootstrap's minbase: an init, a bus for systemctl, and `ip` for whoever looks in.
const packages = "systemd,systemd-sysv,dbus,iproute2"

// tree returns a Debian tree like this machine's release, made with debootstrap if it is not there yet. It is never
// written to: hosts are overlays over it.
func tree(t *testing.T) string {
	t.Helper()
	suite := osRelease(t)
	dir := filepath.Join(cacheDir, suite)
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		t.Fatal(err)
	}
	// Several runs may want it at once: one makes it.
	lock, err := os.Open(cacheDir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	half := dir + ".new"
	if err := os.RemoveAll(half); err != nil {
		t.Fatal(err)
	}
	t.Logf("making a tree of %s with debootstrap, for this and later runs, in %s", suite, dir)
	cmd := exec.CommandContext(t.Context(), "debootstrap", "--variant=minbase", "--include="+packages, suite, half, mirror(t.Context(), t, suite))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("debootstrap: %v\n%s", err, tail(out, 20))
	}
	if err := os.Rename(half, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// osRelease is this machine's release, by its code name.
func osRelease(t *testing.T) string {
	t.Helper()
	f, err := os.Open("/etc/os-release")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if v, ok := strings.CutPrefix(sc.Text(), "VERSION_CODENAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	t.Fatal("no VERSION_CODENAME in /etc/os-release: which release should the hosts have?")
	return ""
}

// mirror is where this machine's own apt gets that release from.
func mirror(ctx context.Context, t *testing.T, suite string) string {
	t.Helper()
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		t.Fatalf("apt-get indextargets: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == suite && f[1] == "main" {
			return f[2]
		}
	}
	t.Fatalf("this machine's apt has no source for %s main:\n%s", suite, out)
	return ""
}

func tail(b []byte, lines int) string {
	all := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// overlay mounts a disk of its own for a host over the tree, at dir/root. What the host writes stays in dir until the test
// ends.
func overlay(t *testing.T, tree, dir string) (root string) {
	t.Helper()
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root = filepath.Join(dir, "root")
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", tree, filepath.Join(dir, "upper"), filepath.Join(dir, "work"))
	if err := unix.Mount("overlay", root, "overlay", 0, opts); err != nil {
		t.Fatalf("overlay at %s: %v", root, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Errorf("unmount %s: %v", root, err)
		}
	})
	return root
}
