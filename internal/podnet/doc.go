// Package podnet wires pods to their host, one way for all: for the CNI plugin, the drivers of container engines, `tulle pod`
// and the lab.
//
//	pod namespace                                host namespace
//	eth0  10.244.0.3/32, fd00::3/128  ──veth──   tpXXXXXXXXXXXX  169.254.1.1/32, fe80::1/64
//	      default via 169.254.1.1, fe80::1       10.244.0.3 dev tpX…, fd00::3 dev tpX…
//	      the cluster's space via the same
//
// Every pod has a link of its own, so there is no segment that pods share, and no ARP and no neighbour discovery between
// them. The next hop is the same for all pods, and both ends know each other by permanent neighbour entries.
//
// # Behind a bridge
//
// With [Config.Bridge], pods' links are ports of a bridge of the host, which then has the next hops' addresses and the routes.
// Pods share broadcast, multicast and link-local addresses; IPv4 goes from pod to pod directly, IPv6 by the host. The bridge
// learns nothing: it knows each port's MAC, and sends a port no other pod's packets.
//
// # Source checks
//
// A pod may hold CAP_NET_ADMIN and CAP_NET_RAW. What it sends meets, before anything else on the host looks at it, a chain
// of its own in the nftables table `netdev tulle-pods`: only packets from the pod's addresses pass, and only ARP and
// neighbour discovery for them, and no answer to a DHCP client. Behind a bridge its MAC, and the link-local address that follows from it, are part of that. The rest is counted by reason ([Drops]) and dropped.
//
// # What is kept where
//
// In the kernel, and nowhere else: the host's end of the link carries the pod's addresses and ID in its alias. From that
// [Host.Reconcile] makes the chains anew after somebody has flushed them, without a file and without the process that made
// the pod.
//
// # Concurrency
//
// A [Host] may be used from several goroutines, and by several processes at once.
//
// # Sources
//
// Linux net/ipv4/arp.c, net/ipv6/ndisc.c, net/netfilter/nf_tables_api.c; RFC 826 (ARP), RFC 4861 (neighbour discovery),
// RFC 3927 (169.254.0.0/16).
package podnet
