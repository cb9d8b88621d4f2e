// Package gossip carries the replicated CIDR table (package membership) between
// the nodes of a cluster, over hashicorp/memberlist: who is a member and alive,
// broadcasts, messages to one member, push/pull of the whole table, seeds and
// rejoining, the guards against clones and foreign clusters, and the exchange of
// keys (package keyring). Nothing else in this module imports memberlist.
//
// Concurrency: [Gossip] is safe for concurrent use; its goroutines live in
// [Gossip.Run].
//
// Sources: memberlist's documentation and memberlist #222 (partitions that never
// heal), serf #292 and #579 (keys).
package gossip
