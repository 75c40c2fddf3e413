package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/platter-disk/platter/storage"
)

// recoverJournal applies the journal of a crashed image, makes that durable, and ends the journal's session:
// afterwards the image is an ordinary one. A crash in between leaves the journal as it was, or the image done.
func recoverJournal(f storage.File, h *Header, m Mutant) error {
	l, err := scanJournal(f, h, m)
	if err != nil {
		return err
	}
	if m == MutantRevokeIgnored {
		l.revokes = nil
	}
	changes := newReplayer(l)
	if err := changes.run(); err != nil {
		return err
	}
	if err := changes.write(); err != nil {
		return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
	}
	if size, err := f.Size(); err != nil {
		return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
	} else if size < int64(l.size) {
		if err := f.Truncate(int64(l.size)); err != nil {
			return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
		}
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s: apply the metadata journal: %w", f.Name(), err)
	}
	g := newGeometry(h)
	if o, ok := decodeOperation(l.opstate, &g); ok && h.Incompatible&(IncompatDirty|IncompatCorrupt) == 0 && m != MutantOpstateIgnored {
		return l.resume(o, m)
	}
	return endJournal(f)
}

// resume finishes, or undoes, the operation that a crash interrupted, in a session of the journal that goes on
// where the log ends: a crash in the middle leaves it to be resumed again. Everything in the log is in its place.
func (l *journalLog) resume(o operation, m Mutant) error {
	h, err := ReadHeader(l.file)
	if err != nil {
		return err
	}
	f := &lentFile{File: l.file, returned: func() {}}
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	im := makeImage(f, h, Options{Discipline: Journal, NoBacking: true, JournalCommitInterval: -1, Mutant: m})
	err = im.openTables(size)
	if err == nil {
		err = im.openForWriting(size)
	}
	var damaged *FormatError
	if errors.As(err, &damaged) {
		return endJournal(l.file) // a damaged image can still be repaired; what was under way is a leak then
	} else if err != nil {
		return err
	}
	if err := im.discipline.(*journal).resume(l, o); err != nil {
		return err
	}
	if err := im.finishOperation(o); err != nil && im.failed() != nil {
		return err
	}
	return im.Close() // an operation that cannot be finished leaves leaks
}

// endJournal clears the journal's feature bit durably. Everything in the journal is in its place.
func endJournal(f storage.File) error {
	var word [8]byte
	if _, err := f.ReadAt(word[:], int64(fieldFeatures.from)); err != nil {
		return fmt.Errorf("%s: end the metadata journal: %w", f.Name(), err)
	}
	bits := binary.BigEndian.Uint64(word[:]) &^ IncompatJournal
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, bits), int64(fieldFeatures.from)); err != nil {
		return fmt.Errorf("%s: end the metadata journal: %w", f.Name(), err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%s: end the metadata journal: %w", f.Name(), err)
	}
	return nil
}

// journalOverlay returns a read-only view of a crashed image with its journal applied in memory and the
// feature bit clear, and the number of transactions that are pending.
func journalOverlay(f storage.File, h *Header) (storage.File, int, error) {
	l, err := scanJournal(f, h, "")
	if err != nil {
		return nil, 0, err
	}
	changes := newReplayer(l)
	if err := changes.run(); err != nil {
		return nil, 0, err
	}
	changed := changes.sectors
	if changed[0] == nil {
		changed[0] = new(changedSector)
		if err := storage.ReadFull(f, changed[0].bytes[:], 0); err != nil {
			return nil, 0, fmt.Errorf("%s: header: %w", f.Name(), err)
		}
	}
	features := changed[0].bytes[fieldFeatures.from:]
	binary.BigEndian.PutUint64(features, binary.BigEndian.Uint64(features)&^IncompatJournal)
	size, err := f.Size()
	if err != nil {
		return nil, 0, err
	}
	for i := range changed {
		size = max(size, (i+1)*sectorSize)
	}
	size = max(size, int64(l.size))
	return &overlayFile{File: f, changed: changed, size: size}, l.pending, nil
}

// overlayFile shows a file with some sectors changed. It refuses to be written.
type overlayFile struct {
	storage.File
	changed changedSectors
	size    int64
}

func (o *overlayFile) Size() (int64, error) { return o.size, nil }

func (o *overlayFile) ReadAt(p []byte, off int64) (int, error) {
	return o.patch(p, off, storage.ReadFull(o.File, p, off))
}

func (o *overlayFile) TryReadAt(p []byte, off int64) (int, error) {
	return o.patch(p, off, storage.TryReadFull(o.File, p, off))
}

func (o *overlayFile) patch(p []byte, off int64, err error) (int, error) {
	if err != nil {
		return 0, err
	}
	for at := off &^ (sectorSize - 1); at < off+int64(len(p)); at += sectorSize {
		if s := o.changed[at/sectorSize]; s != nil {
			from := max(off, at)
			copy(p[from-off:], s.bytes[from-at:])
		}
	}
	if n := max(o.size-off, 0); n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

func (o *overlayFile) refuse() error {
	return fmt.Errorf("%s: the image was opened read-only with its metadata journal pending", o.Name())
}

func (o *overlayFile) WriteAt([]byte, int64) (int, error) { return 0, o.refuse() }
func (o *overlayFile) Truncate(int64) error               { return o.refuse() }
func (o *overlayFile) PunchHole(int64, int64) error       { return o.refuse() }
func (o *overlayFile) ZeroRange(int64, int64) error       { return o.refuse() }
func (o *overlayFile) Allocate(int64, int64) error        { return o.refuse() }

// DataExtents reports everything as data: the changed sectors may lie in holes.
func (o *overlayFile) DataExtents(off, length int64, fn func(storage.Extent) bool) error {
	if n := min(length, o.size-off); n > 0 {
		fn(storage.Extent{Offset: off, Length: n, Data: true})
	}
	return nil
}
