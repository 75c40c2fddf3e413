package qcow2

import "fmt"

// Mutant is a known wrong order of updates. Mutants exist so that crash exploration can prove that it would
// notice: no image that matters is ever to be written with one.
type Mutant string

const (
	MutantHistorical     Mutant = "historical-order"     // release the old count, link the table, then write the data
	MutantLinkFirst      Mutant = "link-before-data"     // the entry is durable before the data is written
	MutantReuseEarly     Mutant = "reuse-before-unlink"  // a released cluster is handed out at once
	MutantNoCopyUp       Mutant = "no-copy-up-barrier"   // nothing waits for copied-up data
	MutantLowerEarly     Mutant = "lower-before-unlink"  // counts are lowered before the unlink is durable
	MutantPunchEarly     Mutant = "punch-before-unlink"  // space is given back before the unlink is durable
	MutantDirtyLate      Mutant = "dirty-bit-late"       // lazy: the dirty bit follows the words it announces
	MutantDirtyEarly     Mutant = "dirty-bit-early"      // lazy: the dirty bit is cleared before the counts are written
	MutantLazyNoBarrier  Mutant = "lazy-no-data-barrier" // lazy: words do not wait for the data they expose
	MutantNoB1           Mutant = "journal-no-data-barrier"
	MutantJournalReuse   Mutant = "journal-immediate-reuse"
	MutantNoWAL          Mutant = "journal-no-wal"                // tables are written in place before the log
	MutantNoCheckpointB  Mutant = "journal-no-checkpoint-barrier" // the tail moves before the tables are durable
	MutantRingEarly      Mutant = "journal-early-ring-reuse"      // ring space is reused before the superblock is durable
	MutantSameSession    Mutant = "journal-constant-session"      // every session has the same identity
	MutantRevokeIgnored  Mutant = "journal-revoke-ignored"        // records of freed tables are replayed
	MutantOpstateIgnored Mutant = "journal-opstate-ignored"       // recovery does not finish what was under way
	MutantSumsIgnored    Mutant = "journal-sums-ignored"          // data checksums: recovery does not compare them
	MutantOverwriteEarly Mutant = "journal-overwrite-early"       // data checksums: data in doubt is overwritten
	MutantStaleCopied    Mutant = "stale-copied-on-apply"         // an applied tree has the COPIED bits of before
	MutantInPlaceL1      Mutant = "in-place-l1"                   // a snapshot is applied over the active L1 table
	MutantMoveEarly      Mutant = "move-before-tables"            // the header points to moved tables before they are written
	MutantShrinkLate     Mutant = "shrink-late"                   // what is cut off is given up before the disk is smaller
)

// Mutants lists the wrong orders that Options.Mutant takes and the disciplines that each applies to.
func Mutants() map[Mutant][]string {
	inPlace := []string{Synchronous, Ordered, Lazy}
	return map[Mutant][]string{
		MutantHistorical: {Ordered}, MutantLinkFirst: inPlace, MutantReuseEarly: inPlace, MutantNoCopyUp: inPlace,
		MutantLowerEarly: {Synchronous, Ordered}, MutantPunchEarly: inPlace,
		MutantDirtyLate: {Lazy}, MutantDirtyEarly: {Lazy}, MutantLazyNoBarrier: {Lazy},
		MutantNoB1: {Journal}, MutantJournalReuse: {Journal}, MutantNoWAL: {Journal}, MutantNoCheckpointB: {Journal},
		MutantRingEarly: {Journal}, MutantSameSession: {Journal}, MutantRevokeIgnored: {Journal}, MutantOpstateIgnored: {Journal},
		MutantSumsIgnored: {Journal}, MutantOverwriteEarly: {Journal},
		MutantStaleCopied: {Synchronous, Ordered}, MutantInPlaceL1: inPlace,
		MutantMoveEarly:  {Synchronous, Ordered, Journal}, // under Lazy the tables are rebuilt
		MutantShrinkLate: Disciplines(),
	}
}

func (m Mutant) validate() error {
	if _, known := Mutants()[m]; m != "" && !known {
		return fmt.Errorf("mutant %q is not known", string(m))
	}
	return nil
}
