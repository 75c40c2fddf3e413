package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/platter-disk/platter/image"
	"github.com/platter-disk/platter/image/gate"
)

const (
	scratchSize = 256 << 30 // bytes of the virtual disks that workloads run on; the files are sparse
	defaultFill = 256 << 20
	scratchUnit = 64 << 10 // cluster size, the default of qcow2
)

// Scratch makes images to measure with. They all have the default options of qcow2.
type Scratch struct {
	Dir  string // where the images go; use the file system that is to be measured
	Fill int64  // bytes of data that workloads on existing data find; 0 for 256 MiB
	n    int
}

// Make returns the name of a new qcow2 image that suits the workload, for a run with the given options.
func (s *Scratch) Make(ctx context.Context, w Workload, o Options) (string, error) {
	data := s.Fill
	if data == 0 {
		data = defaultFill
	}
	s.n++
	name := filepath.Join(s.Dir, fmt.Sprintf("%s-%d.qcow2", w.Name, s.n))
	switch w.on {
	case OwnData:
		return name, s.create(ctx, name, "", data)
	case BelowData:
		measured, warm := o.operations(w)
		base := name + ".base"
		// Every operation works on a unit of its own.
		need := int64(measured+warm) * scratchUnit
		if err := s.create(ctx, base, "", max(need, data)); err != nil {
			return name, err
		}
		return name, s.create(ctx, name, base, 0)
	default:
		return name, s.create(ctx, name, "", 0)
	}
}

// Remove deletes an image that Make made.
func (s *Scratch) Remove(name string) error {
	err := os.Remove(name)
	if e := os.Remove(name + ".base"); e != nil && !os.IsNotExist(e) && err == nil {
		err = e
	}
	return err
}

func (s *Scratch) create(ctx context.Context, name, base string, data int64) error {
	o := image.CreateOptions{Gate: gate.SameDirectory{}}
	o.Size, o.ClusterSize = scratchSize, scratchUnit
	if base != "" {
		o.BackingFile, o.BackingFormat = filepath.Base(base), "qcow2"
	}
	if err := image.Create(ctx, "qcow2", name, o); err != nil || data == 0 {
		return err
	}
	img, err := image.Open(ctx, name, image.Options{Format: "qcow2"})
	if err != nil {
		return err
	}
	if err := fill(ctx, img, data); err != nil {
		img.Close()
		return err
	}
	return img.Close()
}
