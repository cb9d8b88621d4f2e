package hostnet

import (
	"strings"
	"testing"
)

func TestReversePathProblems(t *testing.T) {
	for _, c := range []struct {
		name, all, own string
		strict         bool
	}{
		{"off", "0", "0", false},
		{"strict for all", "1", "0", true},
		{"strict for all and the device", "1", "1", true},
		{"strict for the device", "0", "1", true},
		{"loose for all", "2", "1", false},
		{"loose for the device", "1", "2", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			h.device("eth0.7", "192.0.2.1/24")
			h.device("eth1", "198.51.100.1/24")
			h.setSysctl("net/ipv4/conf/eth1/rp_filter", "2")
			h.setSysctl("net/ipv4/conf/all/rp_filter", c.all)
			h.setSysctl("net/ipv4/conf/eth0.7/rp_filter", c.own)
			var got []Problem
			h.do(func() (err error) { got, err = ReversePathProblems([]string{"eth0.7", "eth1", "gone"}); return err })
			if !c.strict {
				if len(got) != 0 {
					t.Errorf("problems %v", got)
				}
				return
			}
			if len(got) != 1 || !strings.Contains(got[0].What, "net.ipv4.conf.all.rp_filter="+c.all) ||
				!strings.Contains(got[0].What, "net.ipv4.conf.eth0/7.rp_filter="+c.own) || !strings.Contains(got[0].Remedy, "sysctl -w net.ipv4.conf.eth0/7.rp_filter=2") {
				t.Errorf("problems %v", got)
			}
		})
	}
}
