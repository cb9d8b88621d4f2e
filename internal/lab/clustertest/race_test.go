//go:build race

package clustertest

// raceEnabled has the agents built with the race detector when the tests are.
const raceEnabled = true
