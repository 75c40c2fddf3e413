package image

import (
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxNesting bounds how many devices lie upon each other: partitions of loop devices of files, and so on.
const maxNesting = 16

// sysfsSector is the unit in bytes in which the kernel tells where a partition lies, whatever the device's sectors.
const sysfsSector = 512

// locate finds out where the bytes of a file or block device lie: those of a partition in its disk, those of a loop
// device in the file behind it (sysfs: Documentation/ABI, /sys/block/loopX/loop). What sysfs does not tell stays as it
// is.
func locate(info fs.FileInfo) region {
	r := wholeFile(info)
	for range maxNesting {
		if r.device == "" {
			if r.device = deviceNumber(r.file); r.device == "" {
				return r
			}
			r.file = nil
		}
		if !r.outOfPartition() && !r.outOfLoop() {
			return r
		}
	}
	return r
}

// deviceNumber is what block devices are told apart by, "" for any other file.
func deviceNumber(info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || info.Mode()&fs.ModeDevice == 0 || info.Mode()&fs.ModeCharDevice != 0 {
		return ""
	}
	rdev := uint64(st.Rdev)
	return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
}

// outOfPartition turns a region of a partition into one of its disk; false if it is of something else.
func (r *region) outOfPartition() bool {
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + r.device)
	if err != nil {
		return false
	}
	disk := readAttribute(filepath.Dir(dir), "dev")
	start, ok := readNumber(dir, "start")
	length, sized := readNumber(dir, "size")
	if disk == "" || !ok || !sized || start > math.MaxInt64/sysfsSector || length > math.MaxInt64/sysfsSector {
		return false
	}
	r.device = disk
	r.shift(start*sysfsSector, length*sysfsSector)
	return true
}

// outOfLoop turns a region of a loop device into one of the file behind it; false if it is of something else.
func (r *region) outOfLoop() bool {
	dir := "/sys/dev/block/" + r.device + "/loop"
	info, err := os.Stat(readAttribute(dir, "backing_file"))
	if err != nil {
		return false
	}
	offset, ok := readNumber(dir, "offset")
	limit, limited := readNumber(dir, "sizelimit")
	if !ok || !limited {
		return false
	}
	if limit == 0 {
		limit = math.MaxInt64
	}
	r.device, r.file = "", info
	r.shift(offset, limit)
	return true
}

// shift turns a region of something that begins at byte start of something else, and has length bytes, into one of that.
func (r *region) shift(start, length int64) {
	sum := func(a, b int64) int64 {
		if a > math.MaxInt64-b {
			return math.MaxInt64
		}
		return a + b
	}
	r.start, r.end = sum(r.start, start), sum(min(r.end, length), start)
}

// readAttribute reads a file of sysfs, "" if it is not there.
func readAttribute(dir, name string) string {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

func readNumber(dir, name string) (n int64, ok bool) {
	n, err := strconv.ParseInt(readAttribute(dir, name), 10, 64)
	return n, err == nil && n >= 0
}
