package agent

import (
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
)

// A reason that no packet of a capture can have is refused, with what shows such packets.
func TestCaptureReasons(t *testing.T) {
	for reason, want := range map[string]string{
		"send_error": "", "tun_write": "",
		"pod_source": "the kernel drops these packets at the pod's link", "pod_neighbour": "tulle pod list", "pod_dhcp": "tulle pod list", "pod_protocol": "tulle pod list", "pod_multicast": "tulle pod list",
		"socket_overflow": "tulle status",
		"nonsense":        `reason "nonsense": want some of not_member, `,
	} {
		_, err := new(session).captureFilter(api.CaptureRequest{Reasons: []string{reason}})
		if want == "" && err == nil {
			continue
		}
		if want == "" || api.CodeOf(err) != api.CodeUsage || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%s: %v, want %q", reason, err, want)
		}
		if strings.Contains(err.Error(), "socket_overflow,") {
			t.Errorf("socket_overflow is offered: %v", err)
		}
	}
}
