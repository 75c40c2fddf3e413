package qcow2

import (
	"slices"
	"sync"

	"github.com/platter-disk/platter/block"
	"github.com/platter-disk/platter/storage"
)

// SnapshotDevice returns a read-only device that shows a snapshot: what the disk held when it was taken, at the
// size it had. The image may be used meanwhile, written to included, but the snapshot cannot be deleted before
// the device is closed. The device reads through the image's files and ends with the image.
func (im *Image) SnapshotDevice(idOrName string) (block.Device, error) {
	im.resizing.Lock()
	defer im.resizing.Unlock()
	if err := im.errIfClosed(); err != nil {
		return nil, err
	}
	list, _, err := im.snapshotTable()
	if err != nil {
		return nil, err
	}
	i, err := im.findSnapshot(list, idOrName)
	if err != nil {
		return nil, err
	}
	s := &list[i]
	if im.geo.dataFile {
		return nil, im.corrupt("nb_snapshots", "a snapshot", "none in an image with an external data file")
	}
	if !im.opts.ReadOnly {
		// The device reads the file itself. The snapshot's tables change no more once they are in it, but for
		// COPIED bits, which mean nothing there.
		if err := im.discipline.writeback(); err != nil {
			return nil, err
		}
	}
	h := im.Header()
	h.Size = s.DiskSize
	if err := im.checkSizeFits(s); err != nil {
		return nil, err
	}
	t, err := im.readTree(s.L1Offset, int64(s.L1Size))
	if err != nil {
		return nil, err
	}
	if missing := im.geo.l1Needed(int64(s.DiskSize)) - int64(len(t.words)); missing > 0 {
		t.words = slices.Concat(t.words, make([]uint64, missing))
	}
	f := &lentFile{File: im.file}
	o := Options{ReadOnly: true, L2CacheSize: im.opts.L2CacheSize}
	if backing := im.backing.get(); backing != nil {
		o.Backing = lentDevice{backing}
	}
	d := makeImage(f, &h, o)
	d.useTables(t)
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.viewed == nil {
		im.viewed = map[string]int{}
	}
	id := s.ID
	im.viewed[id]++
	f.returned = sync.OnceFunc(func() {
		im.mu.Lock()
		defer im.mu.Unlock()
		im.viewed[id]--
	})
	return d, nil
}

// lentFile is a file that belongs to somebody else.
type lentFile struct {
	storage.File
	returned func()
}

func (f *lentFile) Close() error {
	f.returned()
	return nil
}

// lentDevice is a device that belongs to somebody else.
type lentDevice struct{ block.Device }

func (lentDevice) Close() error { return nil }
