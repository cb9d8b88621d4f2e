// Package gossip distributes the replicated CIDR table (package membership) among
// the nodes of a cluster, over hashicorp/memberlist. It provides the list of members
// and their state, broadcasts, messages to one member, push/pull of the whole table,
// seeds and rejoining, checks against cloned nodes and foreign clusters, and key
// rotation (package keyring). No other package of this module imports memberlist.
//
// Concurrency: [Gossip] is safe for concurrent use. Its goroutines run within
// [Gossip.Run].
//
// Sources: memberlist's documentation and memberlist #222 (partitions that never
// heal), serf #292 and #579 (keys).
package gossip
