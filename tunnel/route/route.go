// Package route is the engine's forwarding table: a longest-prefix match from an inner address to whatever its owner
// is to the engine.
//
// A [Table] is built once, by [Build], and never changes afterwards, so that any number of goroutines read it without a
// lock; who wants another table builds one and swaps the pointer. Lookup costs the same for ten and for ten thousand
// prefixes (github.com/gaissmai/bart, a multibit trie with a stride of eight bits).
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

// Build makes a table of the prefixes. Host bits are masked away, an IPv4-mapped IPv6 prefix is not an IPv4 one, and of
// two equal prefixes the later wins.
func Build[V any](routes iter.Seq2[netip.Prefix, V]) *Table[V] {
	t := new(Table[V])
	for p, v := range routes {
		t.trie.Insert(p.Masked(), v)
	}
	return t
}

// Lookup returns the value of the longest prefix that holds addr, which must not be an IPv4-mapped IPv6 address.
func (t *Table[V]) Lookup(addr netip.Addr) (V, bool) { return t.trie.Lookup(addr) }

// Len is the number of prefixes.
func (t *Table[V]) Len() int { return t.trie.Size() }
