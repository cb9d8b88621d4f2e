// Package keyring keeps a node's gossip keys: the set in memory, its file, and
// the ring of the running gossip, which follows every change.
//
// Concurrency: a [Ring] is safe for concurrent use.
package keyring
