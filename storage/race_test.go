//go:build race

package storage_test

// raceEnabled: the race detector allocates, so allocation counts mean nothing.
const raceEnabled = true
