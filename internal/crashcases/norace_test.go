//go:build !race

package crashcases

const fewStates = 60
