// Package ipam holds what a node does with the address space that it owns: its
// open blocks, which pod has which address, and the file that remembers all of
// this across crashes. What it gives away, and to whom, is package ownership's.
//
// The rules (prefix.go, pool.go) open no file, read no clock and log
// nothing; time is passed in. The [Store] is the one part that does I/O.
//
// Concurrency: a [Pool] is used by one goroutine at a time; a [Store] may be used
// by several.
//
// Sources: RFC 4632 (CIDR), RFC 3021 (/31), RFC 4291 §2.6.1 (subnet-router
// anycast); for the store, the rename-after-fsync discipline of fsync(2) and
// rename(2).
package ipam
