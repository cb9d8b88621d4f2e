// Package soak breaks a small cluster in many ways, one after the other, while its pods send to each other, and checks
// every packet end to end: none arrives where it is not for, none is changed or comes twice, none is lost while nothing is broken, everything heals, and agents do not grow.
// The test breaks each kind of thing once, always the same way. TULLE_SOAK=1h (or `make soak`) goes on with random faults for that time.
// TULLE_SOAK_SEED repeats the choice of faults, TULLE_SOAK_REPORT names a file for the figures.
package soak
