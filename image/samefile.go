package image

import (
	"io/fs"
	"math"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/platter-disk/platter/nbd"
)

// SameFile tells whether two paths or URIs, such as those of a Layer, are known to lead to the same bytes: one file
// under two names, one block device by two nodes, a loop device and the whole file behind it, one NBD export in two
// spellings.
func SameFile(a, b string) bool {
	return a == b || sameExport(a, b, strings.EqualFold) || compareRegions(a, b, region.same)
}

// mayBeSame tells whether two paths or URIs may lead to the same bytes, if only to some, for those who are about to
// overwrite one of the two: a loop device and its file overlap, a disk and its partition do, and the names of this
// machine count as one.
func mayBeSame(a, b string) bool {
	return a == b || compareRegions(a, b, region.overlaps) ||
		sameExport(a, b, func(a, b string) bool { return strings.EqualFold(a, b) || isLoopback(a) && isLoopback(b) })
}

// isAmong tells whether a path or URI may lead to one of files.
func isAmong(files []identity, name string) bool {
	return slices.ContainsFunc(files, func(f identity) bool { return mayBeSame(f.name, name) })
}

// compareRegions compares where the bytes of two files lie; false if one of them is not there.
func compareRegions(a, b string, how func(a, b region) bool) bool {
	infoA, errA := os.Stat(a)
	infoB, errB := os.Stat(b)
	return errA == nil && errB == nil && how(locate(infoA), locate(infoB))
}

// region is where the bytes of a file or of a block device lie: a range of a file, or of a device that is not itself a
// part or an image of something else.
type region struct {
	file       fs.FileInfo
	device     string // number of the device; "" for a file
	start, end int64  // bytes; end is math.MaxInt64 for as far as it goes
}

func wholeFile(info fs.FileInfo) region { return region{file: info, end: math.MaxInt64} }

// inOneStorage tells whether the two are ranges of one file or device.
func (r region) inOneStorage(other region) bool {
	return r.device == other.device && (r.device != "" || os.SameFile(r.file, other.file))
}

func (r region) same(other region) bool {
	return r.inOneStorage(other) && r.start == other.start && r.end == other.end
}

func (r region) overlaps(other region) bool {
	return r.inOneStorage(other) && r.start < other.end && other.start < r.end
}

// sameExport tells whether two names are URIs of one NBD export, hosts being compared by sameHost. Encrypted or not,
// it is the same export.
func sameExport(a, b string, sameHost func(a, b string) bool) bool {
	if !isNBD(a) || !isNBD(b) {
		return false
	}
	u, errU := nbd.ParseURI(a)
	v, errV := nbd.ParseURI(b)
	if errU != nil || errV != nil || u.Network != v.Network || u.Export != v.Export {
		return false
	}
	if u.Network == "unix" {
		return SameFile(u.Address, v.Address)
	}
	hostU, portU, errU := net.SplitHostPort(u.Address)
	hostV, portV, errV := net.SplitHostPort(v.Address)
	return errU == nil && errV == nil && portU == portV && sameHost(hostU, hostV)
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() || strings.EqualFold(host, "localhost")
}
