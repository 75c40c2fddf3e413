package qcow2

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/platter-disk/platter/storage"
)

// Header extensions and the backing file name may lie anywhere in cluster 0, of which only the first sector
// changes atomically. A rewrite is therefore a chain of steps; each lays out what is new in bytes that the header
// before it has no use for, and then switches the first sector (specification section 18.20).

// byteRange is [from, to) of the header cluster.
type byteRange struct{ from, to int64 }

// tail returns the ranges past the first sector that extensions and backing file name are decoded from.
func (h *Header) tail() []byteRange {
	end := int64(h.HeaderLength) + 8 // the end marker
	for _, e := range h.Extensions {
		end += 8 + (int64(len(e.Data))+7)&^7
	}
	name := int64(h.BackingFileOffset)
	if name != 0 {
		end = min(end, name)
	}
	return []byteRange{
		{max(sectorSize, int64(h.HeaderLength)), max(sectorSize, min(end, h.ClusterSize()))},
		{max(sectorSize, name), max(sectorSize, name+int64(h.BackingFileSize))},
	}
}

// headerStep returns the header cluster that follows old on the way to wanted: everything that either is decoded
// from is in its place. ok is false if they need the same bytes for different things.
func headerStep(name string, old, wanted []byte) (next []byte, ok bool, err error) {
	before, err := DecodeHeader(name, old)
	if err != nil {
		return nil, false, err
	}
	after, err := DecodeHeader(name, wanted)
	if err != nil {
		return nil, false, err
	}
	next = slices.Clone(wanted)
	for _, r := range before.tail() {
		copy(next[r.from:], old[r.from:r.to])
	}
	for _, r := range after.tail() {
		if !bytes.Equal(next[r.from:r.to], wanted[r.from:r.to]) {
			return nil, false, nil
		}
	}
	return next, true, nil
}

// detours returns layouts of the header in memory that leave more of cluster 0 alone than the final one: with the
// backing file name, or the extensions too, past everything that the old and the final layout use. A crash may
// leave the image with one of them.
func (h *Header) detours(name string, old, final []byte) ([][]byte, error) {
	var used int64
	for _, raw := range [][]byte{old, final} {
		d, err := DecodeHeader(name, raw)
		if err != nil {
			return nil, err
		}
		for _, r := range d.tail() {
			used = max(used, r.to)
		}
	}
	var list [][]byte
	apart := *h
	if raw, err := apart.encode(used); err == nil {
		list = append(list, raw)
	}
	moved := *h
	moved.Unknown = append(slices.Clone(h.Unknown), make([]byte, (used+7)&^7-headerLengthOut-int64(len(h.Unknown)))...)
	if raw, err := moved.Encode(); err == nil {
		list = append(list, raw)
	}
	return list, nil
}

// headerSteps returns the header clusters to go through from old to that of h, which is the last. The error wraps ErrHeaderFull if cluster 0 is too small to change without a moment at which a crash would
// destroy the header.
func (im *Image) headerSteps(old []byte, h *Header) ([][]byte, error) {
	name := im.file.Name()
	final, err := h.Encode()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	next, ok, err := headerStep(name, old, final)
	if err != nil {
		return nil, err
	}
	if ok {
		return [][]byte{next, final}, nil
	}
	detours, err := h.detours(name, old, final)
	if err != nil {
		return nil, err
	}
	for _, d := range detours {
		first, ok, err := headerStep(name, old, d)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		second, ok, err := headerStep(name, first, final)
		if err != nil {
			return nil, err
		}
		if ok {
			return [][]byte{first, second, final}, nil
		}
	}
	return nil, fmt.Errorf("%s: %w: a cluster of %d bytes cannot hold the old header and the new one at once, as is needed to survive a crash",
		name, ErrHeaderFull, im.geo.clusterSize)
}

// rewriteHeader brings the whole header in memory to the file, so that a crash leaves the old or the new one. An
// error that does not fail the image leaves the file as it was. The caller holds mu.
func (im *Image) rewriteHeader() error {
	now, err := im.readHeaderCluster()
	if err != nil {
		return err
	}
	steps, err := im.headerSteps(now, im.header)
	if err != nil {
		return err
	}
	for _, next := range steps {
		if !bytes.Equal(now[sectorSize:], next[sectorSize:]) {
			if err := im.writeMetadata(next[sectorSize:], sectorSize); err != nil {
				return err
			}
		}
		if !bytes.Equal(now[:sectorSize], next[:sectorSize]) {
			if err := im.switchSector(next); err != nil {
				return err
			}
		}
		now = next
	}
	return nil
}

func (im *Image) readHeaderCluster() ([]byte, error) {
	p := make([]byte, im.geo.clusterSize)
	if err := storage.ReadFull(im.file, p, 0); err != nil {
		return nil, fmt.Errorf("%s: header: %w", im.file.Name(), err)
	}
	return p, nil
}

// switchSector writes the first sector of the header between two barriers.
func (im *Image) switchSector(header []byte) error {
	if err := im.syncFiles(); err != nil {
		return err
	}
	if err := im.writeMetadata(header[:sectorSize], 0); err != nil {
		return err
	}
	return im.syncFiles()
}
