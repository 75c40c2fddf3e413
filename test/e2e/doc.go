// Package e2e tests the program as its users meet it: `platter serve` is built, started on a real image and
// worked on by programs that know nothing of it (nbdinfo, nbdcopy, fio, qemu-io, a Linux guest in QEMU).
// Afterwards both checkers, ours and QEMU's, must find nothing.
//
// The package has tests only. Each names the programs it needs and skips without them; in CI none may be
// missing. Environment variables:
//
//	PLATTER_BINARY        absolute path of the program to test; empty builds ./cmd/platter
//	PLATTER_KILL_ROUNDS   how often TestKill kills the server in the middle of writes (default 10)
package e2e
