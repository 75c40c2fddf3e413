//go:build race

package fvd

const raceEnabled = true
