package encap

import (
	"fmt"
	"testing"

	"github.com/tulle-net/tulle/internal/testing/damage"
	"github.com/tulle-net/tulle/tunnel/header"
)

// TestUnwrapDamaged runs each decoder of outer packets over damaged ones.
func TestUnwrapDamaged(t *testing.T) {
	inner := goldenInner(false)
	for name, c := range map[string]struct {
		good   []byte
		unwrap func([]byte) ([]byte, Drop)
	}{
		"GUE variant 1": {inner, UnwrapUDP},
		"GUE variant 0": {append([]byte{0, 4, 0, 0}, inner...), UnwrapUDP},
		"IPv4":          {readHex(t, "ipip_4in4"), func(b []byte) ([]byte, Drop) { inner, _, d := UnwrapRaw4(b); return inner, d }},
		"VXLAN":         {readHex(t, "vxlan_4in4")[28:], unwrapVXLAN},
		"IPv6":          {inner, func(b []byte) ([]byte, Drop) { return UnwrapRaw6(b, header.ProtoIPv4) }},
	} {
		t.Run(name, func(t *testing.T) {
			damage.Check(t, c.good, func(b []byte) error {
				inner, d := c.unwrap(b)
				if d != DropNone {
					return fmt.Errorf("%v", d)
				}
				var in header.Inner
				return header.ParseInner(inner, &in)
			})
		})
	}
}
