// Package soak breaks a small cluster in many random ways, one after the other, while its pods send to each other, and checks
// every packet end to end: none arrives where it is not for, none is changed or comes twice, everything heals, and agents do not grow.
// `make soak` runs it for an hour. TULLE_SOAK sets another time, and without it nothing runs: faults are random, and what they find is
// work for a person. TULLE_SOAK_SEED repeats the choice of faults.
package soak
