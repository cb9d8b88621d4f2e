package config

import "iter"

// Nearest returns the one of words that word was probably meant to be, or "" if all are too far from it.
func Nearest(word string, words iter.Seq[string]) string {
	best, dist := "", 4
	for w := range words {
		if d := distance(word, w); d < dist && d < len(w) {
			best, dist = w, d
		}
	}
	return best
}

// distance is Levenshtein's, over bytes; what is longer than any name is far from all.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost = 1 + min(diag, row[j], row[j+1])
			}
			diag, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
