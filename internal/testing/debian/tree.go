// Package debian makes trees of Debian releases with debootstrap, for tests that need another userland than this machine's: hosts
// that boot systemd, container engines of other versions. It needs root, and a mirror.
package debian

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// CacheDir keeps trees between runs: one takes a minute to make.
const CacheDir = "/var/cache/tulle-lab"

// packages are what trees have beyond debootstrap's minbase: an init, a bus for systemctl, `ip` for whoever looks in, and podman
// with the plugins of which Debian 12 wants one package or another (debootstrap cannot choose).
const packages = "systemd,systemd-sysv,dbus,iproute2,podman,containernetworking-plugins"

// Tree returns a tree of that release, made with debootstrap if it is not there yet. Nobody may write to it: see Overlay.
func Tree(t *testing.T, suite string) string {
	t.Helper()
	// The packages are part of the name: a tree of an older test does not do.
	dir := filepath.Join(CacheDir, fmt.Sprintf("%s-%.4x", suite, sha256.Sum256([]byte(packages))))
	if err := os.MkdirAll(CacheDir, 0o755); err != nil {
		t.Fatal(err)
	}
	// Several runs may want it at once: one makes it.
	lock, err := os.Open(CacheDir)
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
	cmd := exec.CommandContext(t.Context(), "debootstrap", "--variant=minbase", "--include="+packages, suite, half, mirror(t.Context(), t))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("debootstrap: %v\n%s", err, tail(out, 20))
	}
	if err := os.Rename(half, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// With returns a tree that has more packages than another one, for Overlay. It is kept like the other one. Nothing is started.
func With(t *testing.T, tree string, packages ...string) string {
	t.Helper()
	dir := fmt.Sprintf("%s+%s", tree, strings.Join(packages, "+"))
	lock, err := os.Open(CacheDir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	upper := filepath.Join(dir, "upper")
	if _, err := os.Stat(dir); err == nil {
		return upper + ":" + tree
	}
	half := dir + ".new"
	if err := os.RemoveAll(half); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.MkdirAll(filepath.Join(half, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("installing %v into %s, for this and later runs", packages, dir)
	cmd := exec.CommandContext(t.Context(), "unshare", append([]string{"-m", "sh", "-ec", installInto, "sh", tree, half}, packages...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("install %v: %v\n%s", packages, err, tail(out, 20))
	}
	if err := os.Rename(half, dir); err != nil {
		t.Fatal(err)
	}
	return upper + ":" + tree
}

// installInto installs packages with this machine's way to the mirror, in a mount namespace of its own.
const installInto = `
tree=$1 half=$2 root=$2/root
shift 2
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$tree,upperdir=$half/upper,workdir=$half/work" "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
cp /etc/resolv.conf "$root/etc/resolv.conf"
mount --bind /etc/apt "$root/etc/apt"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
export DEBIAN_FRONTEND=noninteractive
chroot "$root" apt-get update -qq
chroot "$root" apt-get install -y -qq --no-install-recommends "$@"
rm -rf "$root"/var/lib/apt/lists/* "$root/usr/sbin/policy-rc.d"
`

// Release is this machine's release, by its code name.
func Release(t *testing.T) string {
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

// mirror is where this machine's own apt gets its release from; it has the others too.
func mirror(ctx context.Context, t *testing.T) string {
	t.Helper()
	suite := Release(t)
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

// Overlay mounts a disk of its own for a host over the tree, at dir/root. What the host writes stays in dir until the test
// ends.
func Overlay(t *testing.T, tree, dir string) (root string) {
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
