// Package route is the engine's forwarding table: a longest-prefix match from an inner address to a value that describes
// its owner.
//
// [Build] builds a [Table], which never changes afterwards: any number of goroutines can read it without a lock. To change
// routes, build a new table and swap the pointer. A lookup costs about the same for ten and for ten thousand prefixes
// (github.com/gaissmai/bart, a multibit trie with a stride of eight bits).
package route

import (
	"iter"
	"net/netip"

	"github.com/gaissmai/bart"
)

// Table maps prefixes of both families to values. The zero value is an empty table. It must not be copied.
type Table[V any] struct {
	trie bart.Fast[V]
}

// Build makes a table from routes. It clears host bits. An IPv4-mapped IPv6 prefix is not an IPv4 prefix. If two prefixes
// are equal, the later one wins.
func Build[V any](routes iter.Seq2[netip.Prefix, V]) *Table[V] {
	t := new(Table[V])
	for p, v := range routes {
		t.trie.Insert(p.Masked(), v)
	}
	return t
}

// Lookup returns the value of the longest prefix that contains addr, which must not be an IPv4-mapped IPv6 address.
func (t *Table[V]) Lookup(addr netip.Addr) (V, bool) { return t.trie.Lookup(addr) }

// Len returns the number of prefixes.
func (t *Table[V]) Len() int { return t.trie.Size() }
