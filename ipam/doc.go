// Package ipam manages the address space that a node owns: its open blocks, the
// addresses of its pods, and the state file that keeps both across crashes.
// Package ownership decides which space the node gives away, and to whom.
//
// The rules (prefix.go, pool.go) open no file, read no clock and log nothing;
// time is passed in. Only the [Store] does I/O.
//
// Concurrency: a [Pool] is used by one goroutine at a time; a [Store] may be used
// by several.
//
// Sources: RFC 4632 (CIDR), RFC 3021 (/31), RFC 4291 §2.6.1 (subnet-router
// anycast); fsync(2) and rename(2) for the store.
package ipam
