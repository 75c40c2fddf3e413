package crashlab

import (
	"fmt"

	"github.com/platter-disk/platter/storage"
)

// Contents reads what the watched sectors of a disk hold, in their order: of the guest's own disk, or of another
// view of it, such as a snapshot. What lies past the end of the disk is zeros.
func (g *Guest) Contents() ([]byte, error) {
	view := make([]byte, g.watch.slots*storage.SectorSize)
	return view, g.watch.read(g.sub, g.sub.Size(), view)
}

// Revert makes the watched sectors hold what Contents returned at some earlier time, through do. verb names it.
// The disk keeps its size.
func (g *Guest) Revert(verb string, contents []byte, do func() error) error {
	if want := g.watch.slots * storage.SectorSize; len(contents) != want {
		return fmt.Errorf("crashlab: %s: %d bytes of contents, want %d", verb, len(contents), want)
	}
	r, err := g.issue(verb, func(r *request, _ uint32) error {
		for slot := range g.values {
			data := sector(contents[slot*storage.SectorSize:][:storage.SectorSize])
			g.values[slot] = append(g.values[slot], value{req: r, data: &data})
		}
		return nil
	})
	if err != nil {
		return err
	}
	return g.answer(r, do())
}
