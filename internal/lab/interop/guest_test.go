package interop

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tulle-net/tulle/internal/lab"
	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// modules of the guest, each after those that it needs.
const modules = `virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci failover net_failover virtio_net
	tunnel4 ip_tunnel tunnel6 ipip sit ip6_tunnel udp_tunnel ip6_udp_tunnel fou fou6 vxlan`

// initScript is the guest's first process. Each line that comes over the second serial port is a command; its output and
// its exit code go back.
const initScript = `#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for m in $(cat /modules/order); do insmod /modules/$m.ko || echo "no module $m"; done
uname -r >/version
stty raw -echo </dev/ttyS1
ip() { /sbin/ip "$@"; } # not busybox's
exec </dev/ttyS1 >/dev/ttyS1 2>&1
echo; echo ` + done + ` 0
while read -r line; do
	eval "$line" </dev/null
	code=$?
	echo; echo ` + done + ` $code
done
`

const done = "::done::" // begins the line after a command's output, followed by the exit code

// guest is a virtual machine with Debian's kernel, busybox, and Debian's ip. Its eth0 is a port of a switch.
type guest struct {
	t     testing.TB
	in    io.Writer
	lines chan string
	log   string // the file with the kernel's messages
}

// boot starts a guest behind the interface tap0 of the switch, and waits for its shell. Its network card has no offloads:
// every checksum is the guest kernel's own, and every frame on the tap has at most the MTU.
func boot(t testing.TB, sw *hosts.Host, kernel string) *guest {
	t.Helper()
	dir := t.TempDir()
	image := initramfs(t, dir, kernel, modules, initScript)
	sw.IP("tuntap add tap0 mode tap", "link set tap0 master br0 up")
	g := &guest{t: t, lines: make(chan string, 64), log: filepath.Join(dir, "console")}
	cmd := exec.Command("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", one(t, filepath.Join(kernel, "boot/vmlinuz-*")), "-initrd", image, "-append", "console=ttyS0 quiet panic=-1",
		"-serial", "file:"+g.log, "-serial", "stdio", "-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no",
		"-device", "virtio-net-pci,netdev=net,romfile=,csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ufo=off,guest_ecn=off,host_tso4=off,host_tso6=off,host_ufo=off,host_ecn=off")
	stdin, err := cmd.StdinPipe()
	check(t, err)
	stdout, err := cmd.StdoutPipe()
	check(t, err)
	cmd.Stderr = os.Stderr
	g.in = stdin
	check(t, lab.Start(cmd, sw.NetnsPath()))
	go func() { // ends with the process
		defer close(g.lines)
		for sc := bufio.NewScanner(stdout); sc.Scan(); {
			g.lines <- strings.TrimRight(sc.Text(), "\r")
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		for range g.lines {
		}
		_ = cmd.Wait()
	})
	began := time.Now()
	if _, err := g.await(2 * time.Minute); err != nil {
		t.Fatalf("the guest does not boot: %v", err)
	}
	t.Logf("the guest has booted after %.1f s: Linux %s", time.Since(began).Seconds(), g.run("cat /version"))
	return g
}

// run runs a command in the guest and returns what it prints; the test ends if it fails.
func (g *guest) run(command string) string {
	g.t.Helper()
	out, err := g.try(command)
	check(g.t, err)
	return out
}

// try is run that returns the error, with what was printed in it.
func (g *guest) try(command string) (string, error) {
	if _, err := io.WriteString(g.in, command+"\n"); err != nil {
		return "", err
	}
	out, err := g.await(time.Minute)
	if err != nil {
		err = fmt.Errorf("guest: %s: %w: %s", command, err, out)
	}
	return out, err
}

// await reads until a command has ended.
func (g *guest) await(limit time.Duration) (string, error) {
	timeout := time.After(limit)
	var out []string
	for {
		select {
		case line, ok := <-g.lines:
			code, last := strings.CutPrefix(line, done+" ")
			switch {
			case !ok:
				console, _ := os.ReadFile(g.log)
				return "", fmt.Errorf("QEMU has ended: %s", console)
			case last && code != "0":
				return strings.TrimSpace(strings.Join(out, "\n")), fmt.Errorf("exit code %s", code)
			case last:
				return strings.TrimSpace(strings.Join(out, "\n")), nil
			}
			out = append(out, line)
		case <-timeout:
			console, _ := os.ReadFile(g.log)
			return "", fmt.Errorf("no end within %v; so far %q, console: %s", limit, out, console)
		}
	}
}

// kernelTree is the folder with the kernel for guests.
func kernelTree(t testing.TB) string {
	t.Helper()
	kernel := os.Getenv("TULLE_INTEROP")
	if kernel == "" {
		t.Skip("TULLE_INTEROP names no folder with a kernel: run make interop")
	}
	return kernel
}

// guestStart is how the first process of a guest begins.
const guestStart = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
ip() { /sbin/ip "$@"; } # not busybox's
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
mount -t tmpfs run /run
for m in $(cat /modules/order); do insmod /modules/$m.ko || echo "no module $m"; done
`

// runAlone runs a guest without network, whose first process is the script, until it powers itself off. It returns what was printed. dir is that of
// initramfs.
func runAlone(t testing.TB, dir, modules, script string, limit time.Duration) string {
	t.Helper()
	kernel := kernelTree(t)
	image := initramfs(t, dir, kernel, modules, script)
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	// A busy machine lets the guest's kernel believe that its timer does not work.
	out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "768", "-smp", "2", "-nodefaults", "-display", "none", "-no-reboot",
		"-kernel", one(t, filepath.Join(kernel, "boot/vmlinuz-*")), "-initrd", image, "-append", "console=ttyS0 quiet panic=-1 no_timer_check", "-serial", "stdio").CombinedOutput()
	text := strings.ReplaceAll(string(out), "\r", "")
	if err != nil {
		t.Fatalf("QEMU: %v: %s", err, text)
	}
	return text
}

// initramfs packs what the guest needs into an archive: busybox, ip(8) with its libraries, the modules, the script that runs
// first, and what is in dir/root already.
func initramfs(t testing.TB, dir, kernel, modules, script string) string {
	t.Helper()
	root := filepath.Join(dir, "root")
	for _, d := range []string{"bin", "proc", "dev", "sys", "run", "modules"} {
		check(t, os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	check(t, os.WriteFile(filepath.Join(root, "init"), []byte(script), 0o755))
	check(t, os.WriteFile(filepath.Join(root, "modules/order"), []byte(modules), 0o644))
	busybox, err := exec.LookPath("busybox")
	check(t, err)
	copyFile(t, busybox, filepath.Join(root, "bin/busybox"))
	ip, err := exec.LookPath("ip")
	check(t, err)
	copyFile(t, ip, filepath.Join(root, "sbin/ip"))
	libraries, err := exec.Command("ldd", ip).Output()
	check(t, err)
	for word := range strings.FieldsSeq(string(libraries)) {
		if strings.HasPrefix(word, "/") {
			copyFile(t, word, filepath.Join(root, word))
		}
	}
	files := map[string]string{}
	check(t, filepath.WalkDir(filepath.Join(kernel, "lib/modules"), func(path string, _ fs.DirEntry, err error) error {
		files[filepath.Base(path)] = path
		return err
	}))
	for m := range strings.FieldsSeq(modules) {
		copyFile(t, files[m+".ko"], filepath.Join(root, "modules", m+".ko"))
	}
	image := filepath.Join(dir, "initramfs")
	cmd := exec.Command("sh", "-c", "busybox find . | busybox cpio -o -H newc >"+image)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", cmd, err, out)
	}
	return image
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	check(t, err)
	check(t, os.MkdirAll(filepath.Dir(to), 0o755))
	check(t, os.WriteFile(to, b, 0o755))
}

// one is the only file that a pattern matches.
func one(t testing.TB, pattern string) string {
	t.Helper()
	all, err := filepath.Glob(pattern)
	check(t, err)
	if len(all) != 1 {
		t.Fatalf("%d files are %s: run make interop", len(all), pattern)
	}
	return all[0]
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
