//go:build race

package bench

// raceEnabled: the race detector makes the runtime allocate.
const raceEnabled = true
