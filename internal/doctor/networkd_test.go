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
bus=$(dbus-daemon --system --fork --nopidfile --print-pid)
caps=+net_admin,+net_bind_service,+net_raw,+net_broadcast
setpriv --reuid systemd-network --regid systemd-network --clear-groups --inh-caps $caps --ambient-caps $caps /lib/systemd/systemd-networkd 2>/run/log &
networkd=$!
trap 'kill $networkd $bus' EXIT
index=$(cat /sys/class/net/tun0/ifindex)
wait_for() {
	i=0
	until grep -qx "ADMIN_STATE=$1" /run/systemd/netif/links/$index; do
		i=$((i + 1)); test $i -lt 200 || { cat /run/log; exit 1; }
		sleep 0.05
	done 2>/dev/null
}
doctor() { tulle doctor managers --config /dev/null --socket /nonexistent/s > /run/out || true; cat /run/out; }
wait_for configured
doctor
sh -ec "$(sed -n 's/^ *\$ //p' /run/out | grep networkctl)" # of the device; a reload is all that networkd needs
wait_for unmanaged
doctor
sh -ec "$(sed -n 's/^ *\$ //p' /run/out | sed 's/ && systemctl restart systemd-networkd$//')" # nothing here could restart it
doctor
`, filepath.Dir(n.Program())))
	out := h.Run("unshare", "-m", "sh", "-e", script)
	at := 0
	for _, want := range []string{
		"FAILED managers: systemd-networkd manages tun0 (configured)", "networkctl reload",
		"systemd-networkd: tun0 unmanaged, keeps routes of others false", "ManageForeignRoutes=no", "0 ok, 1 warning, 0 failed",
		"systemd-networkd: tun0 unmanaged, keeps routes of others true", "1 ok, 0 warnings, 0 failed",
	} {
		i := strings.Index(out[at:], want)
		if i < 0 {
			t.Fatalf("%q is missing, or in another place, in\n%s", want, out)
		}
		at += i
	}
}
