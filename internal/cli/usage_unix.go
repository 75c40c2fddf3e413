//go:build unix

package cli

import (
	"os"
	"syscall"
)

// diskUsage is how many bytes of disk space a file takes; nil where that is not known.
func diskUsage(name string) *int64 {
	info, err := os.Stat(name)
	if err != nil {
		return nil
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	n := int64(st.Blocks) * 512
	return &n
}
