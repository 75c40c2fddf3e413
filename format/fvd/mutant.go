package fvd

import "fmt"

// Mutant is a known wrong order of updates. Mutants exist so that crash exploration can prove that it would notice:
// no image that matters is ever to be written with one. Most bring back a defect of FVD specification 4.2.
type Mutant string

const (
	MutantNoTableBarrier    Mutant = "no-table-barrier"    // D-01: no barrier between table and header in a checkpoint
	MutantReuseAfterFailure Mutant = "reuse-after-failure" // D-02: journal sectors are reused although their checkpoint failed
	MutantClearDirtyEarly   Mutant = "clear-dirty-early"   // D-03: mappings count as durable before the checkpoint that writes them ends
	MutantStaleEarly        Mutant = "stale-early"         // D-04: bits count as durable before the checkpoint that writes them ends
	MutantNoLatch           Mutant = "no-latch"            // D-05: errors of metadata are forgotten
	MutantNoDataBarrier     Mutant = "no-data-barrier"     // D-06: a record that sets bits does not wait for the data
	MutantMetadataFirst     Mutant = "metadata-first"      // D-07: with a data file, records do not wait for it and a flush syncs it last
	MutantNoPadding         Mutant = "no-padding"          // D-08: journal writes share 4 KiB blocks of the medium
	MutantStraddle          Mutant = "straddle"            // D-09: bits are recorded in a sector before that of their mappings
	MutantReuseUnzeroed     Mutant = "reuse-unzeroed"      // D-10: chunks are handed out without being zeroed
	MutantReuseEarly        Mutant = "reuse-early"         // a chunk is used again before losing its mapping is durable
	MutantLateSnapshot      Mutant = "late-snapshot"       // a checkpoint copies the tables after the data barrier, not before
	MutantEmptyInPart       Mutant = "empty-in-part"       // a record tells EMPTY of a chunk of which only a part was zeroed
	MutantInUseNotDurable   Mutant = "in-use-not-durable"  // D-12: clean_shutdown=0 is written and no barrier follows
	MutantForgetDirty       Mutant = "forget-dirty"        // an image that lost track of its tables becomes clean by being closed
	MutantNoChecksum        Mutant = "no-checksum"         // journal sectors count whatever their checksum
)

// Mutants lists the wrong orders that Options.Mutant takes.
func Mutants() []Mutant {
	return []Mutant{
		MutantNoTableBarrier, MutantReuseAfterFailure, MutantClearDirtyEarly, MutantStaleEarly, MutantNoLatch, MutantNoDataBarrier,
		MutantMetadataFirst, MutantNoPadding, MutantStraddle, MutantReuseUnzeroed, MutantReuseEarly, MutantLateSnapshot, MutantEmptyInPart,
		MutantInUseNotDurable, MutantForgetDirty, MutantNoChecksum,
	}
}

func (m Mutant) validate() error {
	for _, known := range Mutants() {
		if m == known {
			return nil
		}
	}
	if m != "" {
		return fmt.Errorf("mutant %q is not known", string(m))
	}
	return nil
}
