package crashcases

import "github.com/platter-disk/platter/format/fvd"

// fvdMutants lists the wrong orders of FVD with the workloads that give them away.
func fvdMutants() []Mutant {
	none := []string{fvdNone}
	immediate, journaled := []string{fvdImmediate}, []string{fvdImmediate, fvdBuffered}
	return []Mutant{
		{string(fvd.MutantNoTableBarrier), "D-01: no barrier between table and header in a checkpoint", journaled, "recycle"},
		{string(fvd.MutantReuseAfterFailure), "D-02: journal sectors are reused although their checkpoint failed", journaled, "failure"},
		{string(fvd.MutantClearDirtyEarly), "D-03: mappings count as durable before the checkpoint that writes them ends", immediate, "in-flight"},
		{string(fvd.MutantStaleEarly), "D-04: bits count as durable before the checkpoint that writes them ends", immediate, "settling"},
		{string(fvd.MutantNoLatch), "D-05: errors of metadata are forgotten", journaled, "failure"},
		{string(fvd.MutantNoDataBarrier), "D-06: a record that sets bits does not wait for the data", journaled, "overlay"},
		{string(fvd.MutantMetadataFirst), "D-07: with a data file, records do not wait for it and a flush syncs it last", journaled, "data-overlay"},
		{string(fvd.MutantNoPadding), "D-08: journal writes share 4 KiB blocks of the medium", journaled, "ruinous"},
		{string(fvd.MutantStraddle), "D-09: bits are recorded in a sector before that of their mappings", journaled, "mixed"},
		{string(fvd.MutantReuseUnzeroed), "D-10: chunks are handed out without being zeroed", journaled, "device"},
		{string(fvd.MutantReuseEarly), "a chunk is used again before losing its mapping is durable", journaled, "reuse"},
		{string(fvd.MutantLateSnapshot), "a checkpoint copies the tables after the data barrier, not before", immediate, "late-copy"},
		{string(fvd.MutantEmptyInPart), "a record tells EMPTY of a chunk of which only a part was zeroed", journaled, "zeros-and-copies"},
		{string(fvd.MutantInUseNotDurable), "D-12: clean_shutdown=0 is written and no barrier follows", none, "dirty-overlay"},
		{string(fvd.MutantForgetDirty), "an image that lost track of its tables becomes clean by being closed", none, "dirty"},
		{string(fvd.MutantNoChecksum), "journal sectors count whatever their checksum", journaled, "ruinous"},
	}
}
