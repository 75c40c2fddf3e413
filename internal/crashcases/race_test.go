//go:build race

package crashcases

// fewStates is few where everything takes an order of magnitude longer; the order of writes is the same.
const fewStates = 10
