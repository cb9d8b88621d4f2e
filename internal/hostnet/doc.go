// Package hostnet holds a host's network in the state that the agent wants: the
// TUN device's addresses and flags, routes, sysctls and an nftables table of its
// own. It compares what should be with what is and mends the difference; it
// never replays a list of commands. It needs no `ip`, `nft` or `iptables`
// binary: everything goes by netlink and /proc/sys.
//
// # What carries our mark
//
//   - routes: protocol [Protocol] in the main table, and either out of the TUN
//     device or of type unreachable;
//   - policy rules of priority [HostsTable], and routes of our protocol in the table of
//     that number;
//   - addresses: all of those on the TUN device, which is ours;
//   - nftables: everything in the table `inet tulle`, and nothing elsewhere;
//   - sysctls: those that a [Reconciler] changed, whose earlier values it keeps.
//
// Nothing else is ever changed. Where somebody else's route stands in the way,
// it stays, and the conflict is reported with the route's text.
//
// # Concurrency
//
// A [Reconciler]'s methods may be called from several goroutines; Reconcile and
// Remove run one at a time. No goroutine outlives the call that started it. A
// Reconciler belongs to the network namespace in which [New] was called.
//
// # Sources
//
// rtnetlink(7), Linux net/ipv4/fib_trie.c, net/ipv6/ip6_fib.c and
// net/ipv6/addrconf.c, Documentation/networking/ip-sysctl.rst,
// net/netfilter/nf_tables_api.c.
package hostnet
