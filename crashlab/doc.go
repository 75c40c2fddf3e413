// Package crashlab finds out whether a disk image survives a power cut.
//
// It stands under an engine in place of its files. A [Lab] holds one file or several in memory (an overlay,
// its backing file, a data file), hands them out as [storage.File] and records in one history who wrote,
// zeroed, punched, truncated and synced what, together with what the guest above was told. From the history
// it builds what the disks may hold after a crash at each point, reopens the image on every such state, and
// asks whether the promises made to the guest still hold.
//
//	Scenario: how to prepare, open, work, judge          (data: the caller's; crashlab knows no format)
//	   |
//	Explore ── records Work on a Lab ── crash states ── Open on each ── judge ── shrink ── Report
//	                    |                                     |
//	              Guest: tagged writes,                 Oracle: the values each guest sector
//	              flushes, as events                    may hold at that moment
//
// # The crash model
//
// A crash at some instant leaves, in each file on its own, everything covered by the last completed Sync of
// that file (everything that had returned before that Sync was called) plus any subset of what came after, in
// any order, requests in flight included. Writes tear: each unit of 512 bytes, or of 4 KiB where the
// [Model] says so, independently holds any one of the contents it had since that Sync, old to new. The size
// of the file is one more such value; a sector beyond the size that survived is gone, and one whose growth
// survived while its bytes did not reads as zeros, or as poison. Zeroings and hole punches are writes of
// zeros, a truncation drops what lies beyond.
//
// # What is judged
//
// Every state must open, pass the subject's own checker, and show in every guest sector a value the history
// allows: what the last completed flush covered or something issued later, never older, never foreign. Opening
// it once more must show the same disk, and so must a crash in the middle of that recovery. The disk is then
// used again, and crashed again.
//
// States are explored exhaustively while they are few and by seeded sampling beyond; a [Report] always says
// how many of how many. The same seed gives the same report for the same history, however many workers.
//
// Around it: [Fault] and [Injector] make the n-th operation fail, [Counter] counts what reaches a file.
package crashlab
