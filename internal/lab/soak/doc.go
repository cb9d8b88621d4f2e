// Package soak breaks a small cluster in many random ways, one after the other, while its pods send to each other, and checks
// every packet end to end: none arrives where it is not for, none is changed or comes twice, everything heals, and agents do not grow.
// `go test` runs it for a minute, `make soak` for an hour; TULLE_SOAK sets another time, TULLE_SOAK_SEED repeats a run.
package soak
