package image

import (
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/platter-disk/platter/nbd"
)

// SameFile tells whether two paths or URIs, such as those of a Layer, are known to lead to the same bytes: one file
// under two names, one block device by two nodes, one NBD export in two spellings.
func SameFile(a, b string) bool {
	if a == b || sameExport(a, b, strings.EqualFold) {
		return true
	}
	infoA, errA := os.Stat(a)
	infoB, errB := os.Stat(b)
	return errA == nil && errB == nil && sameInfo(infoA, infoB)
}

// mayBeSame is SameFile for those who are about to overwrite one of the two: the names of this machine count as one.
func mayBeSame(a, b string) bool {
	return SameFile(a, b) || sameExport(a, b, func(a, b string) bool { return isLoopback(a) && isLoopback(b) })
}

// isAmong tells whether a path or URI may lead to one of files.
func isAmong(files []identity, name string) bool {
	return slices.ContainsFunc(files, func(f identity) bool { return mayBeSame(f.name, name) })
}

// sameInfo tells whether two files are one, or nodes of one block device.
func sameInfo(a, b fs.FileInfo) bool {
	if os.SameFile(a, b) {
		return true
	}
	deviceA, okA := deviceNumber(a)
	deviceB, okB := deviceNumber(b)
	return okA && okB && deviceA == deviceB
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
