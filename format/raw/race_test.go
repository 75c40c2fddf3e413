//go:build race

package raw_test

// raceEnabled: the race detector allocates, so allocation counts mean nothing.
const raceEnabled = true
