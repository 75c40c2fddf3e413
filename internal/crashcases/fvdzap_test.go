package crashcases

import (
	"context"
	"io"
	"sync/atomic"
	"testing"

	"github.com/platter-disk/platter/crashlab"
	"github.com/platter-disk/platter/format/fvd"
	"github.com/platter-disk/platter/storage"
)

// split is an image whose journal lies in a file of its own. The rest is in a file that does not crash.
type split struct {
	storage.File // the rest
	journal      storage.File
	start, end   int64 // of the journal in the image
}

// each calls fn for the parts of [off, off+n) with the file that has them and where.
func (f split) each(off, n int64, fn func(file storage.File, at, from, to int64) (int, error)) (done int, err error) {
	for from := off; from < off+n && err == nil; from = off + int64(done) {
		file, at, to := f.File, from, off+n
		switch {
		case from < f.start:
			to = min(to, f.start)
		case from < f.end:
			file, at, to = f.journal, from-f.start, min(to, f.end)
		}
		var m int
		m, err = fn(file, at, from-off, to-off)
		done += m
	}
	return done, err
}

func (f split) ReadAt(p []byte, off int64) (int, error) {
	return f.each(off, int64(len(p)), func(file storage.File, at, from, to int64) (int, error) {
		n, err := file.ReadAt(p[from:to], at)
		if int64(n) == to-from && err == io.EOF {
			err = nil
		}
		return n, err
	})
}

func (f split) WriteAt(p []byte, off int64) (int, error) {
	return f.each(off, int64(len(p)), func(file storage.File, at, from, to int64) (int, error) { return file.WriteAt(p[from:to], at) })
}

func (f split) Sync() error { return f.journal.Sync() }

func (f split) DataExtents(off, n int64, fn func(storage.Extent) bool) error {
	if off < f.start || off >= f.end {
		return f.File.DataExtents(off, n, fn)
	}
	return f.journal.DataExtents(off-f.start, n, func(e storage.Extent) bool {
		e.Offset += f.start
		return fn(e)
	})
}

// zapped is the exploration of a journal alone. The rest of the image is, after each crash, what it was when the work
// ended: its tables are those of creation then, and no byte of the data was written twice, so that nothing but the journal
// says which of it counts.
type zapped struct {
	run        *fvdRun
	base, rest *storage.Memory
	left       *storage.Memory // the rest when the work ended
	opened     atomic.Bool
	start, end int64
}

// image is the image as a crash leaves it; the first time, the one that the work uses.
func (z *zapped) image(files []storage.File) ([]storage.File, error) {
	rest := z.rest
	if z.opened.Swap(true) {
		var err error
		if rest, err = copyOf(z.left); err != nil {
			return nil, err
		}
	}
	return []storage.File{split{rest, files[0], z.start, z.end}, z.base}, nil
}

func (z *zapped) prepare(files []storage.File) error {
	if err := z.run.prepare([]storage.File{z.rest, z.base}); err != nil {
		return err
	}
	h, err := fvd.ReadHeader(z.rest)
	if err != nil {
		return err
	}
	z.start, z.end = int64(h.JournalOffset), int64(h.JournalOffset+h.JournalSize)
	journal := make([]byte, h.JournalSize)
	if err := storage.ReadFull(z.rest, journal, z.start); err != nil {
		return err
	}
	_, err = files[0].WriteAt(journal, 0)
	return err
}

func (z *zapped) open(files []storage.File) (crashlab.Subject, error) {
	all, err := z.image(files)
	if err != nil {
		return nil, err
	}
	return z.run.open(all)
}

// work writes to block after block of the base image, here and there, each once.
func (z *zapped) work(g *crashlab.Guest) error {
	for i := range int64(40) {
		err := g.Write(i*17%50*4*kib+512*(i%5), 512*(1+i%3))
		if err == nil && i%3 == 2 {
			err = g.Flush()
		}
		if err != nil {
			return err
		}
	}
	var err error
	z.left, err = copyOf(z.rest)
	return err
}

// TestZappedJournal: a medium that loses the sector, or the 4 KiB, that it is writing takes no record along that was
// durable, and leaves nothing that counts (FVD specification 5: "neighbours in the same 4 KiB zapped when checksums are
// on"). Nothing but the journal has checksums: the whole file on such a medium is more than the format can survive.
func TestZappedJournal(t *testing.T) {
	for _, discipline := range []string{fvdImmediate, fvdBuffered} {
		for _, mutant := range []string{"", string(fvd.MutantNoPadding)} {
			z := &zapped{base: storage.NewMemory("base"), rest: storage.NewMemory("image")}
			z.run = &fvdRun{c: Case{Format: "fvd", Discipline: discipline, Mutant: mutant}, fvdWorkload: fvdWorkload{
				base:   fvdBase,
				create: fvd.CreateOptions{Size: fvdSize, Compact: true, BlockSize: 4 * kib, ChunkSize: 16 * kib, GrowUnit: 64 * kib, JournalSize: 512 * kib},
			}}
			t.Run(z.run.c.String(), func(t *testing.T) {
				sc := crashlab.Scenario{
					Name: z.run.c.String(), Files: []crashlab.FileSpec{{Name: "journal"}},
					Prepare: z.prepare, Open: z.open, Work: z.work, Judge: z.run.judge,
				}
				r, err := crashlab.Explore(context.Background(), sc, crashlab.Options{
					States: 400, Seed: *seed, Models: []crashlab.Model{{Tear: 512, Zap: true}, {Tear: 4096, Zap: true}},
				})
				if err != nil {
					t.Fatal(err)
				}
				if caught := len(r.Violations) > 0; caught != (mutant != "") {
					t.Errorf("violations:\n%s", text(t, r))
				}
				t.Logf("explored %d of %s states", r.Explored, r.Possible)
			})
		}
	}
}
