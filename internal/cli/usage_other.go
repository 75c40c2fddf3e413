//go:build !unix

package cli

import "os"

// diskUsage is how many bytes of disk space a file takes, which is its length where the system does not tell
// more; nil where that is not known.
func diskUsage(name string) *int64 {
	info, err := os.Stat(name)
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	n := info.Size()
	return &n
}
