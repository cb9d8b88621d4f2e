//go:build !amd64

package header

// implementations are all those that this machine can run.
func implementations() map[string]func([]byte) uint16 {
	return map[string]func([]byte) uint16{"sum": sum}
}
