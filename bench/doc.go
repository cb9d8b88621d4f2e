// Package bench implements `tulle bench`: scenarios, measuring methods,
// statistics and reports, each in files of their own. A scenario is a function
// that takes options and returns a result of plain values, so that a run can be
// printed as a table or as JSON, or compared with another run.
//
// The package asserts nothing about times: it prints the figures together with
// the method.
//
// Concurrency: a scenario starts everything that it measures, and has ended it
// when it returns. Run one scenario at a time, because they share the machine.
package bench
