package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/platter-disk/platter/storage"
)

const (
	snapshotFixedSize = 40 // bytes of an entry before its extra data
	snapshotKnown     = 24 // bytes of extra data with a meaning: 64-bit VM state size, disk size, icount
	snapshotExtraV3   = 16 // bytes of extra data that version 3 demands
)

// Snapshot is one entry of the snapshot table. Its L1 table is a copy of the active one at the moment it was
// taken; the COPIED bits in it mean nothing.
type Snapshot struct {
	L1Offset    uint64 // bytes in the image file, cluster-aligned; not validated
	L1Size      uint32 // entries, at most 4194304; not validated
	ID          string // a decimal number as a rule
	Name        string
	Seconds     uint32 // date: seconds since 1970
	Nanoseconds uint32 // and their fraction
	VMClock     uint64 // nanoseconds of guest run time
	VMStateSize uint64 // bytes of VM state, mapped past the end of the disk
	DiskSize    uint64 // bytes of the disk at that moment; 0 if the entry does not say (version 2)
	ICount      uint64 // instruction counter, all ones if unused
	ExtraSize   uint32 // bytes of extra data the entry has in the file, at most 1024 of which are valid
	Unknown     []byte // extra data past what this package knows, kept as it is
}

// Date is the time the snapshot was taken.
func (s *Snapshot) Date() time.Time { return time.Unix(int64(s.Seconds), int64(s.Nanoseconds)) }

// errSnapshotTruncated tells a reader that it has to fetch more bytes; with everything fetched it means that
// the entry does not end inside the bytes there are.
var errSnapshotTruncated = errors.New("snapshot table entry is cut short")

// snapshotSize returns the encoded size of the entry that starts with b, at least snapshotFixedSize bytes of
// it. The parts are 16 and 32 bits wide, so the sum cannot wrap.
func snapshotSize(b []byte) int64 {
	return snapshotFixedSize + int64(binary.BigEndian.Uint32(b[36:])) +
		int64(binary.BigEndian.Uint16(b[12:])) + int64(binary.BigEndian.Uint16(b[14:]))
}

// decodeSnapshot decodes the entry at the start of b and returns its size without padding.
func decodeSnapshot(b []byte) (Snapshot, int, error) {
	if len(b) < snapshotFixedSize {
		return Snapshot{}, 0, errSnapshotTruncated
	}
	size := snapshotSize(b)
	if size > int64(len(b)) {
		return Snapshot{}, 0, errSnapshotTruncated
	}
	be := binary.BigEndian
	s := Snapshot{
		L1Offset:    be.Uint64(b[0:]),
		L1Size:      be.Uint32(b[8:]),
		Seconds:     be.Uint32(b[16:]),
		Nanoseconds: be.Uint32(b[20:]),
		VMClock:     be.Uint64(b[24:]),
		VMStateSize: uint64(be.Uint32(b[32:])),
		ICount:      ^uint64(0),
		ExtraSize:   be.Uint32(b[36:]),
	}
	extra := b[snapshotFixedSize:][:s.ExtraSize]
	if len(extra) >= 8 {
		s.VMStateSize = be.Uint64(extra)
	}
	if len(extra) >= 16 {
		s.DiskSize = be.Uint64(extra[8:])
	}
	if len(extra) >= snapshotKnown {
		s.ICount = be.Uint64(extra[16:])
		if len(extra) > snapshotKnown {
			s.Unknown = append([]byte(nil), extra[snapshotKnown:]...)
		}
	}
	rest := b[snapshotFixedSize+s.ExtraSize : size]
	idLen := be.Uint16(b[12:])
	s.ID, s.Name = string(rest[:idLen]), string(rest[idLen:])
	return s, int(size), nil
}

// appendSnapshot appends the entry, at the next multiple of 8, to a table that is being built.
func appendSnapshot(out []byte, s *Snapshot) []byte {
	out = append(out, make([]byte, -len(out)&7)...)
	be := binary.BigEndian
	out = be.AppendUint64(out, s.L1Offset)
	out = be.AppendUint32(out, s.L1Size)
	out = be.AppendUint16(out, uint16(len(s.ID)))
	out = be.AppendUint16(out, uint16(len(s.Name)))
	out = be.AppendUint32(out, s.Seconds)
	out = be.AppendUint32(out, s.Nanoseconds)
	out = be.AppendUint64(out, s.VMClock)
	short := uint32(s.VMStateSize)
	if s.VMStateSize > 1<<32-1 {
		short = 0 // the 64-bit field below overrides it
	}
	out = be.AppendUint32(out, short)
	out = be.AppendUint32(out, uint32(snapshotKnown+len(s.Unknown)))
	out = be.AppendUint64(out, s.VMStateSize)
	out = be.AppendUint64(out, s.DiskSize)
	out = be.AppendUint64(out, s.ICount)
	out = append(out, s.Unknown...)
	out = append(out, s.ID...)
	return append(out, s.Name...)
}

// encodeSnapshots builds a snapshot table. The last entry is not padded.
func encodeSnapshots(snapshots []Snapshot) ([]byte, error) {
	var out []byte
	for i := range snapshots {
		s := &snapshots[i]
		if len(s.ID) > 1<<16-1 || len(s.Name) > 1<<16-1 || len(s.Unknown) > maxSnapshotExtra-snapshotKnown {
			return nil, fmt.Errorf("snapshot %q (%q): id of %d bytes, name of %d, extra data of %d; at most 65535, 65535 and %d fit",
				s.ID, s.Name, len(s.ID), len(s.Name), snapshotKnown+len(s.Unknown), maxSnapshotExtra)
		}
		out = appendSnapshot(out, s)
	}
	if len(snapshots) > maxSnapshots || len(out) > maxSnapshotTableBytes {
		return nil, fmt.Errorf("snapshot table: %d entries in %d bytes, at most %d in %d are allowed",
			len(snapshots), len(out), maxSnapshots, maxSnapshotTableBytes)
	}
	return out, nil
}

// snapshotScanner reads a snapshot table entry by entry with a small buffer, however large the table says
// it is.
type snapshotScanner struct {
	f     storage.File
	start int64 // of the table in the file
	pos   int64 // of the next entry, relative to start, padding not yet skipped
	buf   []byte
}

func newSnapshotScanner(f storage.File, start int64) *snapshotScanner {
	return &snapshotScanner{f: f, start: start}
}

// errSnapshotExtra is returned by next for an entry with more extra data than is allowed; snapshotEntry.size
// says where the next entry starts.
var errSnapshotExtra = errors.New("too much extra metadata in a snapshot table entry")

// next reads one entry. With keepExtra false, an entry with more than 1024 bytes of extra data is an error
// (errSnapshotExtra); with true the data past that are left out, as a repair does.
func (r *snapshotScanner) next(keepExtra bool) (Snapshot, error) {
	at := (r.pos + 7) &^ 7
	if r.start > math.MaxInt64-at-snapshotFixedSize {
		return Snapshot{}, fmt.Errorf("entry at byte %d of the table starts past 2^63-1", at)
	}
	var fixed [snapshotFixedSize]byte
	if err := storage.ReadFull(r.f, fixed[:], r.start+at); err != nil {
		return Snapshot{}, err
	}
	size := snapshotSize(fixed[:])
	if r.start > math.MaxInt64-at-size {
		return Snapshot{}, fmt.Errorf("entry at byte %d of the table: %d bytes end past 2^63-1", at, size)
	}
	extra := int64(binary.BigEndian.Uint32(fixed[36:]))
	r.pos = at + size
	cut := int64(0)
	if extra > maxSnapshotExtra {
		if !keepExtra {
			return Snapshot{ExtraSize: uint32(extra)}, errSnapshotExtra
		}
		cut = extra - maxSnapshotExtra
	}
	// size-cut is at most 40 + 1024 + 2 * 65535 bytes.
	if n := int(size - cut); cap(r.buf) < n {
		r.buf = make([]byte, n)
	}
	buf := r.buf[:size-cut]
	head := snapshotFixedSize + extra - cut
	if err := storage.ReadFull(r.f, buf[:head], r.start+at); err != nil {
		return Snapshot{}, err
	}
	if err := storage.ReadFull(r.f, buf[head:], r.start+at+head+cut); err != nil {
		return Snapshot{}, err
	}
	binary.BigEndian.PutUint32(buf[36:], uint32(extra-cut))
	s, _, err := decodeSnapshot(buf)
	s.ExtraSize = uint32(extra)
	return s, err
}

// readSnapshots reads the snapshot table that the header points to, and returns the size of the table in bytes
// too. Where the entries say that L1 tables lie is not validated: like QEMU, an image with a damaged snapshot
// stays usable.
func readSnapshots(f storage.File, h *Header) ([]Snapshot, int64, error) {
	if h.NbSnapshots == 0 {
		return nil, 0, nil
	}
	if err := h.validateSnapshotTable(f.Name()); err != nil {
		return nil, 0, err
	}
	bad := func(i uint32, problem, field string, found, expected any) error {
		return &FormatError{
			File: f.Name(), Problem: problem, Field: fmt.Sprintf("%s of snapshot table entry %d", field, i),
			Found: fmt.Sprint(found), Expected: fmt.Sprint(expected),
		}
	}
	r := newSnapshotScanner(f, int64(h.SnapshotsOffset))
	var list []Snapshot
	for i := range h.NbSnapshots {
		s, err := r.next(false)
		switch {
		case errors.Is(err, errSnapshotExtra):
			return nil, 0, bad(i, fmt.Sprintf("Too much extra metadata in snapshot table entry %d", i), "extra_data_size",
				"more", fmt.Sprintf("at most %d bytes", maxSnapshotExtra))
		case err != nil:
			return nil, 0, fmt.Errorf("%s: read snapshot table entry %d: %w", f.Name(), i, err)
		case r.pos > maxSnapshotTableBytes:
			return nil, 0, bad(i, "Snapshot table is too big", "end", r.pos, fmt.Sprintf("at most %d", maxSnapshotTableBytes))
		}
		list = append(list, s)
	}
	return list, r.pos, nil
}
