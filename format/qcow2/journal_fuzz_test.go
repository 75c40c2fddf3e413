package qcow2

import (
	"encoding/binary"
	"testing"
)

// FuzzJournalReplay opens an image whose journal holds what the input says, read-only and for writing.
//
//	first byte  session: bit 0 gives the journal blocks of 512 bytes, else of 4096
//	then        blocks: 1 byte, 1 + how much durable_lsn is behind the block's lsn; 2 bytes, length of the
//	            records; the records
//
// Checksums are right: what a fuzzer cannot guess would keep it out.
func FuzzJournalReplay(f *testing.F) {
	block := func(records ...[]byte) []byte {
		var p []byte
		for _, r := range records {
			p = append(p, r...)
		}
		return append(binary.BigEndian.AppendUint16([]byte{1}, uint16(len(p))), p...)
	}
	eight := []byte("\x80\x00\x00\x00\x00\x05\x00\x00")
	f.Add(append([]byte{0}, block(rawRecord(recordWrite, 8, 0x40038, eight))...))
	f.Add(append([]byte{1}, block(rawRecord(recordFill, 65536, 0x30000, eight), rawRecord(recordRevoke, 65536, 0x30000, nil))...))
	f.Add(append([]byte{1}, append(block(rawRecord(recordFill, 1<<31, 1<<40, eight)), block(rawRecord(recordRevoke, 1<<31, 1<<40, nil))...)...))
	f.Add(append([]byte{0}, block(rawRecord(recordSize, 0, 1<<30, nil), rawRecord(recordData, 4096, 0x10000, eight))...))
	o := operation{kind: opDelete, tree: 0x30000, entries: 1}
	state := o.encode()
	f.Add(append([]byte{0}, block(rawRecord(recordOpstate, opstateSize, 0, state[:]), rawRecord(recordNote, 0, 0, nil))...))
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 {
			return
		}
		cluster := int64(65536)
		if input[0]&1 != 0 {
			cluster = 512
		}
		c := craftJournal(t, cluster, 256<<10)
		for p := input[1:]; len(p) >= 3; {
			behind, n := uint64(p[0]), min(int(binary.BigEndian.Uint16(p[1:])), len(p)-3, c.payload())
			c.block(t, p[3:3+n], c.lsn+1-behind)
			p = p[3+n:]
		}
		if im, err := Open(keepOpen{c.file}, Options{ReadOnly: true}); err == nil {
			if _, err := im.ReadAt(make([]byte, 4096), 0); err != nil {
				t.Logf("read: %v", err)
			}
			if err := im.Close(); err != nil {
				t.Errorf("close after reading: %v", err)
			}
		}
		im, err := Open(keepOpen{c.file}, Options{JournalCommitInterval: -1})
		if err != nil {
			return
		}
		if _, err := im.WriteAt(make([]byte, 4096), 4096); err != nil {
			t.Logf("write: %v", err)
		}
		if im.Close() != nil {
			return
		}
		if h, err := ReadHeader(c.file); err == nil && h.Incompatible&IncompatJournal != 0 {
			t.Error("a clean close left the journal's feature bit set")
		}
	})
}
