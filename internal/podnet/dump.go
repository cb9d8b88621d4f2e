package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/internal/sys"
)

// chainRule is what is looked at of a rule that is there.
type chainRule struct {
	comment string // the user data as the kernel has it
	packets uint64 // that its own counter has counted
}

// readRules reads the rules of the table by chain, or those of one chain, in one dump and without decoding what they match: a host with a
// thousand pods has ten thousand of them. There may be no such table. A pod that comes or goes meanwhile may have too many or
// too few rules here: who mends looks again while there is no such pod.
func (h *Host) readRules(chain string) (map[string][]chainRule, error) {
	at := netns.None()
	if h.ns != nil {
		at = netns.NsHandle(h.ns.Fd())
	}
	s, err := nl.GetNetlinkSocketAt(at, netns.None(), unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("podnet: open an nftables netlink socket: %w (is the kernel module nf_tables there?)", err)
	}
	defer s.Close()
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_NETDEV})
	req.AddData(nl.NewRtAttr(unix.NFTA_RULE_TABLE, nl.ZeroTerminated(Table)))
	if chain != "" {
		req.AddData(nl.NewRtAttr(unix.NFTA_RULE_CHAIN, nl.ZeroTerminated(chain)))
	}
	out, err := sys.RetryDump(func() (map[string][]chainRule, error) {
		out := map[string][]chainRule{}
		err := req.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(m []byte) bool {
			if len(m) >= nl.SizeofNfgenmsg {
				name, r := parseRule(m[nl.SizeofNfgenmsg:])
				out[name] = append(out[name], r)
			}
			return true
		})
		if errors.Is(err, netlink.ErrDumpInterrupted) || errors.Is(err, unix.ENOENT) {
			err = nil
		}
		return out, err
	})
	if err != nil {
		return nil, fmt.Errorf("podnet: read the rules of the nftables table netdev %s: %w", Table, err)
	}
	return out, nil
}

// parseRule reads the attributes of a rule (enum nft_rule_attributes).
func parseRule(b []byte) (chain string, r chainRule) {
	sys.EachAttr(b, func(kind uint16, value []byte) {
		switch kind {
		case unix.NFTA_RULE_CHAIN:
			chain = sys.CString(value)
		case unix.NFTA_RULE_USERDATA:
			r.comment = string(value)
		case unix.NFTA_RULE_EXPRESSIONS:
			sys.EachAttr(value, func(_ uint16, expression []byte) { r.packets += counted(expression) })
		}
	})
	return chain, r
}

// counted gives the packets of a counter; 0 of any other expression.
func counted(expression []byte) (packets uint64) {
	counter := false // the name is in front of the data
	sys.EachAttr(expression, func(kind uint16, value []byte) {
		switch {
		case kind == unix.NFTA_EXPR_NAME:
			counter = sys.CString(value) == "counter"
		case kind == unix.NFTA_EXPR_DATA && counter:
			sys.EachAttr(value, func(kind uint16, value []byte) {
				if kind == unix.NFTA_COUNTER_PACKETS && len(value) == 8 {
					packets = binary.BigEndian.Uint64(value)
				}
			})
		}
	})
	return packets
}
