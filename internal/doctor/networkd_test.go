package doctor_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// TestNetworkd has a real systemd-networkd with a real D-Bus on the host, with a file that matches every device, as some images have it. It
// sees them with an /etc/systemd and a /run of their own. A read-only /sys tells networkd that there is no udev to wait for.
func TestNetworkd(t *testing.T) {
	t.Parallel()
	n := hosts.New(t)
	h := n.Host("h")
	script := h.WriteFile("script", fmt.Sprintf(`
PATH=%s:$PATH
mount --make-rprivate /
mount -t tmpfs none /run
mount -t tmpfs none /etc/systemd
mount -o remount,ro,bind /sys
mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp /etc/systemd/network /run/dbus
chown -R systemd-network /run/systemd/netif
printf '[Match]\nName=*\n\n[Network]\nDHCP=no\nLinkLocalAddressing=no\n' > /etc/systemd/network/99-all.network
ip tuntap add dev tun0 mode tun
ip link set tun0 alias tulle
ip link add tp0123456789ab address ee:ee:ee:ee:ee:ee type veth peer name other
ip link set tp0123456789ab alias 'tulle-pod 10.244.0.3 web'
ip link add pods address ee:ee:ee:ee:ee:ee type bridge
ip link add br0 type bridge
bus=$(dbus-daemon --system --fork --nopidfile --print-pid)
caps=+net_admin,+net_bind_service,+net_raw,+net_broadcast
start() {
	setpriv --reuid systemd-network --regid systemd-network --clear-groups --inh-caps $caps --ambient-caps $caps /lib/systemd/systemd-networkd 2>>/run/log &
	networkd=$!
}
start
trap 'kill $networkd $bus' EXIT
wait_for() {
	i=0
	until grep -Eqx "ADMIN_STATE=$2" /run/systemd/netif/links/$(cat /sys/class/net/$1/ifindex); do
		i=$((i + 1)); test $i -lt 1200 || { cat /run/log; exit 1; }
		sleep 0.05
	done 2>/dev/null
}
doctor() { tulle doctor managers --config /dev/null --socket /nonexistent/s > /run/out || true; cat /run/out; }
for d in tun0 tp0123456789ab pods br0; do wait_for $d "configured|configuring"; done
doctor
sh -ec "$(sed -n 's/^ *\$ //p' /run/out | grep networkctl)" # of the device; a reload is all that networkd needs
for d in tun0 tp0123456789ab pods; do wait_for $d unmanaged; done
wait_for br0 "configured|configuring"
doctor
sleep 0.1 # the kernel counts the starts of processes in hundredths of a second
sh -ec "$(sed -n 's/^ *\$ //p' /run/out | sed 's/ && systemctl restart systemd-networkd$//')" # nothing here could restart it
doctor
kill $networkd; wait $networkd || true
sleep 0.1
start
wait_for br0 "configured|configuring"
wait_for tun0 unmanaged
doctor
`, filepath.Dir(n.Program())))
	out := h.Run("unshare", "-m", "sh", "-e", script)
	at := 0
	for _, want := range []string{
		"FAILED managers: systemd-networkd manages tun0, pods, tp0123456789ab:", "networkctl reload",
		"systemd-networkd: tun0 unmanaged, keeps routes of others false, policy rules false", "ManageForeignRoutes=no", "0 ok, 1 warning, 0 failed",
		"has not read /etc/systemd/networkd.conf.d/90-tulle.conf", "$ systemctl restart systemd-networkd", "0 ok, 1 warning, 0 failed",
		"systemd-networkd: tun0 unmanaged, keeps routes of others true, policy rules true", "1 ok, 0 warnings, 0 failed",
	} {
		i := strings.Index(out[at:], want)
		if i < 0 {
			t.Fatalf("%q is missing, or in another place, in\n%s", want, out)
		}
		at += i
	}
}
