// Package keyring manages a node's gossip keys: the set in memory, the key file, and the
// keyring of the running gossip, which is updated with every change.
//
// Concurrency: a [Ring] is safe for concurrent use.
package keyring
