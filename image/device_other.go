//go:build !unix

package image

import "io/fs"

// deviceNumber is what block devices are told apart by; here there are none.
func deviceNumber(fs.FileInfo) (number uint64, ok bool) { return 0, false }
