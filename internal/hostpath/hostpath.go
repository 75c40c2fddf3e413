// Package hostpath resolves the file names that images hold, by the rules of the system it runs on.
package hostpath

import (
	"os"
	"path/filepath"
)

// Fixed tells whether a path means the same file whichever image holds it. On windows that is also a path from the
// root of whichever drive (`\disks\base.qcow2`, `/disks/base.qcow2`) and one from the current directory of a drive
// (`D:base.qcow2`).
func Fixed(path string) bool {
	return path != "" && os.IsPathSeparator(path[0]) || filepath.VolumeName(path) != ""
}

// Beside resolves ref, a path that the image at the path image holds: beside the image unless it is Fixed. On windows
// a path from a root without a drive is on the image's drive. The two are joined as text: what looks like "dir/.." may
// not be here when dir is a symbolic link.
func Beside(image, ref string) string {
	drive := filepath.VolumeName(image)
	switch {
	case !Fixed(ref):
		dir := len(image)
		for dir > len(drive) && !os.IsPathSeparator(image[dir-1]) {
			dir--
		}
		return image[:dir] + ref
	case filepath.VolumeName(ref) == "":
		return drive + ref
	}
	return ref
}
