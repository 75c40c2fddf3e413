package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"
)

// FuzzEngine damages a sound image at places that the input names and uses it, read-only and writable.
//
//	first byte  which image
//	then        14 bytes each: place (2), offset from it (4), the 8 bytes to put there
func FuzzEngine(f *testing.F) {
	all := victims(f)
	for i := range all {
		f.Add([]byte{byte(i), 0, 5, 0, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0x10, 0})
	}
	f.Add([]byte{0, 0, 8, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0}) // compressed, at the header
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 {
			return
		}
		v := all[int(input[0])%len(all)]
		file := v.clone(t)
		size, err := file.Size()
		if err != nil {
			t.Fatal(err)
		}
		for p := input[1:]; len(p) >= 14; p = p[14:] {
			at := int64(v.places[int(binary.BigEndian.Uint16(p))%len(v.places)]) + int64(binary.BigEndian.Uint32(p[2:])%65536)
			if at+8 > size {
				continue
			}
			if _, err := file.WriteAt(p[6:14], at); err != nil {
				t.Fatal(err)
			}
		}
		what := fmt.Sprintf("%s with %x", v.name, input)
		r := rand.New(rand.NewPCG(uint64(len(input)), 7))
		survive(t, file, Options{ReadOnly: true, NoBacking: true}, r, what+" read-only")
		survive(t, file, Options{NoBacking: true, Discard: true, L2CacheSize: 1}, r, what)
	})
}
