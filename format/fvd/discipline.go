package fvd

// update is a change of metadata on its way to the disk: guest range [off, end) got its blocks' bits, or its
// chunks' mappings, or both.
//
// In the words every format uses: it exposes the data of the range, and exposesData says that this data must be
// durable before the record is; it changes the bits and entries of the range, whose values are read from memory
// when the record is built; it releases the chunks that lost their mapping.
type update struct {
	span
	releases []chunkID

	done bool
	err  error
}

// span is the part of an update that a journal record says.
type span struct {
	off, end    guestOffset // multiples of 512
	bits        bool        // set the bits of the range
	entries     bool        // record the mappings of the range
	exposesData bool        // the data of the range must be durable first
}

// discipline decides when and how updates reach the disk. An update may be committed once the memory state it
// describes is in place and its data writes have returned.
type discipline interface {
	// commit makes the update recoverable, or sees to it that the next drain does. Afterwards its entries are
	// no longer pending and its bits are stale bits too.
	commit(u *update) error

	// drain hands every update committed so far to the disk; a barrier makes them durable then.
	drain() error

	// checkpoint brings the tables on disk up to date with memory as it is when the call begins, makes
	// change in the header last, and returns when all of it is durable.
	checkpoint(change headerChange) error

	// holdsReleases reports whether chunks that updates released wait for a checkpoint to reach the allocator.
	holdsReleases() bool

	// close stops whatever runs in the background. Nothing is committed after it.
	close()
}

// headerChange is what a checkpoint writes into the header when the tables are durable.
type headerChange struct {
	seal       epoch // the new stable_journal_epoch; 0: as it is
	clean      bool  // set clean_shutdown
	prefetched bool  // set base_img_fully_prefetched
}
