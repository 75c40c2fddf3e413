package qcow2

import (
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// checkJournalled makes an image with a pending metadata journal examinable: through the journal, or, if it is
// to be repaired, by replaying it. With o.DiscardJournal the journal is dropped instead; what it held is lost,
// and the counts have to be rebuilt from the tables that are there.
func checkJournalled(f storage.File, h *Header, o CheckOptions) (storage.File, *Header, error) {
	switch {
	case o.DiscardJournal:
		if o.Repair != RepairAll {
			return nil, nil, fmt.Errorf("%s: discarding the metadata journal needs -r all", f.Name())
		}
		note(o, "Journal: discarded; acknowledged writes may be lost and stale clusters exposed")
		if err := endJournal(f); err != nil {
			return nil, nil, err
		}
	case o.Repair != RepairNone:
		l, err := scanJournal(f, h, "")
		if err != nil {
			return nil, nil, err
		}
		note(o, fmt.Sprintf("Journal: %d transactions replayed", l.pending))
		if err := recoverJournal(f, h, ""); err != nil {
			return nil, nil, err
		}
	default:
		view, pending, err := journalOverlay(f, h)
		if err != nil {
			return nil, nil, err
		}
		note(o, fmt.Sprintf("Journal: %d transactions pending", pending))
		f = view
	}
	h, err := readHeader(f, forCheck)
	return f, h, err
}

func note(o CheckOptions, message string) {
	if o.Report != nil {
		o.Report(Finding{Kind: FindingNote, Message: message})
	}
}

// checkJournalRegion: nothing may be counted or referenced where the journal lies.
func (c *checker) checkJournalRegion(j *JournalExtension) error {
	g := &c.g
	for at := g.clusterOf(hostOff(j.Offset)); at < g.clusterOf(hostOff(j.Offset+j.Size)); at++ {
		stored, err := c.stored.get(at)
		if err != nil {
			return c.readError(fmt.Sprintf("the refcount of cluster %d", at), err)
		}
		if found := c.counts.get(at); stored != 0 || found != 0 {
			c.corrupt(1, "ERROR cluster %d of the metadata journal has refcount=%d reference=%d", at, stored, found)
		}
	}
	return nil
}
