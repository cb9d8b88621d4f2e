// Package result is what a benchmark of this module found, as one value that can be stored as JSON and read again: the
// machines, the method, every round of every mode with its raw samples, and what follows from them (medians, ratios and
// their intervals). Tables, CSV, comparisons of two runs and the report are all drawn from it.
//
// The package measures nothing. Its functions are pure, except that they write to a given writer.
package result
