// Package e2e tests the program as its users meet it: `platter serve` is built, started on a real image and
// worked on by programs that know nothing of it (nbdinfo, nbdcopy, fio, qemu-io, a Linux guest in QEMU).
// Afterwards both checkers, ours and QEMU's, must find nothing.
//
// The package has tests only. Each names the programs it needs and skips without them; in CI none may be
// missing. Environment variables:
//
//	PLATTER_BINARY        absolute path of the program to test; empty builds ./cmd/platter
//	PLATTER_KILL_ROUNDS   how often TestKill kills the server in the middle of writes (default 10)
//	PLATTER_GUEST_ROUNDS  how often TestGuestKill kills the server under a guest, for each discipline (default 2)
//	PLATTER_GUEST_STATES  how many crash states of recorded guests are judged, for each discipline (default 4)
//	PLATTER_GUEST_SEED    seed of the first of those guests (default 1), to repeat one that failed
package e2e
