// Package bench holds all of Tulle's measurements behind `tulle bench`: the
// scenarios, the methods of measuring, the statistics over what they yield, and
// the printing of it, each apart from the others. A scenario is a function that
// takes options and returns a result of plain values, so that the same run can be
// printed as a table, as JSON, or compared with another one.
//
// Nothing here asserts against a clock: numbers are measured and printed together
// with how they were obtained.
//
// Concurrency: a scenario starts what it measures, and has ended all of it when
// it returns. Run one at a time; they share the machine.
package bench
