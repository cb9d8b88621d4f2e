//go:build !amd64

package header

// sum returns the folded one's-complement sum of b.
func sum(b []byte) uint16 { return sumGo(b) }
