//go:build unix

package image

import (
	"io/fs"
	"syscall"
)

// deviceNumber is what block devices are told apart by; ok is false for any other file.
func deviceNumber(info fs.FileInfo) (number uint64, ok bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeDevice == 0 || info.Mode()&fs.ModeCharDevice != 0 {
		return 0, false
	}
	return uint64(st.Rdev), true
}
