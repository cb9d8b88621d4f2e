// Package hostnet reconciles the host's network with the state that the agent wants:
// the TUN device's addresses and flags, routes, sysctls and an nftables table. It
// compares the desired with the actual state and repairs the difference; it never
// replays a list of commands. It uses netlink and /proc/sys, and no `ip`, `nft` or
// `iptables` binary.
//
// # What carries our mark
//
//   - routes: protocol [Protocol] in the main table, and either out of the TUN
//     device or of type unreachable;
//   - policy rules that lead to the tables [HostsTable] and [DirectTable], and routes of our protocol in
//     these tables;
//   - addresses: all of those on the TUN device, which is ours;
//   - nftables: everything in the table `inet tulle`, and nothing elsewhere;
//   - sysctls: those that a [Reconciler] has changed; it keeps their earlier values.
//
// The package never changes anything else. If a route of another program conflicts
// with ours, that route stays, and the conflict is reported with the route's text.
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
