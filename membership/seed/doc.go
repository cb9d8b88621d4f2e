// Package seed keeps the addresses of the configured seeds: HOST[:PORT] of members that a node tries when it joins.
//
// A name that does not resolve is unknown, not absent: the name server may hang, answer wrongly for a while, or learn the name
// later. So every name is looked up on its own, for each address family apart, again and again; none waits for another, and
// the last good answer holds until a better one comes. Whoever uses a List asks it for what is known now, and never waits for a
// name server.
//
// A List is safe for concurrent use. Its goroutines live in Run.
package seed
