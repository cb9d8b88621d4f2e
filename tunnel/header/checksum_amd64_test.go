package header

// implementations are all those that this machine can run.
func implementations() map[string]func([]byte) uint16 {
	m := map[string]func([]byte) uint16{"sum": sum, "go": sumGo}
	if hasAVX2 {
		m["avx2"] = sumVector
	}
	return m
}
