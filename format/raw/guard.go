package raw

import (
	"bytes"
	"fmt"
	"io/fs"

	"github.com/platter-disk/platter/internal/bufpool"
	"github.com/platter-disk/platter/storage"
)

// probeSize is how many bytes from the start of an image decide what it is probed as.
const probeSize = 512

// magic is a byte sequence by which a format is recognised.
type magic struct {
	format string // the name qemu-img uses, where it knows the format
	offset int
	bytes  string
}

var magics = [...]magic{
	{"qcow", 0, "QFI\xfb\x00\x00\x00\x01"}, // the older format has the same magic number
	{"qcow2", 0, "QFI\xfb"},
	{"fvd", 0, "FVD\x00"},
	{"fvd", 0, "\x00DVF"},
	{"fvd", 0, "\xa9\xf5\x43\x51"}, // its first published draft
	{"vmdk", 0, "KDMV"},
	{"vmdk", 0, "COWD"},
	{"vmdk", 0, "# Disk DescriptorFile"},
	{"vdi", 64, "\x7f\x10\xda\xbe"},
	{"vhdx", 0, "vhdxfile"},
	{"vpc", 0, "conectix"},
	{"qed", 0, "QED\x00"},
	{"luks", 0, "LUKS\xba\xbe"},
	{"parallels", 0, "WithoutFreeSpace"},
	{"parallels", 0, "WithouFreSpacExt"},
	{"bochs", 0, "Bochs Virtual HD Image"},
}

// Foreign returns the name of the format other than raw that an image starting with head is, or "" when it can
// only be raw. head should hold 512 bytes, or the whole file when that is shorter.
func Foreign(head []byte) string {
	for _, m := range magics {
		if len(head) >= m.offset && bytes.HasPrefix(head[m.offset:], []byte(m.bytes)) {
			return m.format
		}
	}
	return ""
}

// guard refuses a change that would make the image look like another format. It looks at what the first sector
// would hold afterwards, so that no sequence of small writes gets around it. The error wraps fs.ErrPermission. The caller holds changes
// exclusively; the range lies inside the disk. A sector that already looks foreign, because the file was
// changed behind our back, may be changed to anything else.
func (d *Device) guard(p []byte, off, length int64) error {
	head := bufpool.Get(probeSize)
	defer head.Put()
	if err := storage.ReadFull(d.f, head.B, 0); err != nil {
		return err
	}
	part := head.B[off:min(off+length, probeSize)]
	clear(part)
	copy(part, p)
	if format := Foreign(head.B); format != "" {
		return fmt.Errorf("write of %d bytes at %d of %s: the image would be taken for %s from then on, because its format was guessed to be raw; name the format raw to allow this: %w",
			length, off, d.f.Name(), format, fs.ErrPermission)
	}
	return nil
}
