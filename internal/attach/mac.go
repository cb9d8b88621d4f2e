package attach

import (
	"fmt"
	"net"
)

// ParseMAC reads a link-layer address that a user wants a pod to have; an empty text means any.
func ParseMAC(text string) (net.HardwareAddr, error) {
	if text == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(text)
	if err != nil {
		return nil, err
	}
	if len(mac) != 6 || mac[0]&1 != 0 || mac.String() == "00:00:00:00:00:00" {
		return nil, fmt.Errorf("%q is not the address of one Ethernet interface: want six bytes, the first one even, not all of them zero", text)
	}
	return mac, nil
}
