package cli

import (
	"errors"
	"math"
	"testing"
)

func TestParseSize(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want int64
		err  error
	}{
		{"10", 10, nil},
		{"10b", 10, nil},
		{"10B", 10, nil},
		{"1k", 1 << 10, nil},
		{"1K", 1 << 10, nil},
		{"2m", 2 << 20, nil},
		{"1g", 1 << 30, nil},
		{"1T", 1 << 40, nil},
		{"1p", 1 << 50, nil},
		{"7E", 7 << 60, nil},
		{"1.5k", 1536, nil},
		{"1.1k", 1126, nil},
		{"0.333G", 357556027, nil},
		{"1.99999999G", 2147483637, nil},
		{"5.", 5, nil},
		{"5.k", 5120, nil},
		{"1.0", 1, nil},
		{"0.0001k", 0, nil},
		{" 5", 5, nil},
		{"\t7", 7, nil},
		{"+5", 5, nil},
		{"010", 10, nil},
		{"0x10", 16, nil},
		{"0X1F", 31, nil},
		{"9223372036854775807", math.MaxInt64, nil},
		{"0x7fffffffffffffff", math.MaxInt64, nil},
		{"9223372036854775808", 0, errSizeRange},
		{"8E", 0, errSizeRange},
		{"18446744073709551616", 0, errSizeRange},
		{"0x10000000000000000", 0, errSizeRange},
		{"1.5", 0, errSizeSyntax},
		{"1.5b", 0, errSizeSyntax},
		{".5k", 0, errSizeSyntax},
		{"", 0, errSizeSyntax},
		{"k", 0, errSizeSyntax},
		{"0x", 0, errSizeSyntax},
		{"0x1_0", 0, errSizeSyntax},
		{"0x-1", 0, errSizeSyntax},
		{"1e3", 0, errSizeSyntax},
		{"5 ", 0, errSizeSyntax},
		{"-5", 0, errSizeSyntax},
		{"-0", 0, errSizeSyntax},
		{"1kk", 0, errSizeSyntax},
		{"1KiB", 0, errSizeSyntax},
		{"1.1.k", 0, errSizeSyntax},
		{"1,5k", 0, errSizeSyntax},
		{"inf", 0, errSizeSyntax},
		{"nan", 0, errSizeSyntax},
	} {
		got, err := parseSize(tt.in)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("parseSize(%q) = %d, %v; expected %d, %v", tt.in, got, err, tt.want, tt.err)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 512: "512 B", 999: "999 B", 1000: "0.977 KiB", 1024: "1 KiB", 4096: "4 KiB", 10752: "10.5 KiB",
		1023488: "1e+03 KiB", 1022976: "999 KiB", 1024000: "0.977 MiB", 1 << 20: "1 MiB", 1073217536: "1 GiB",
		1610612736: "1.5 GiB", 1000000000000: "931 GiB", 10 << 40: "10 TiB", 3 << 50: "3 PiB", math.MaxInt64: "8 EiB",
	} {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %q, expected %q", n, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"1.5G", "0x10", "9223372036854775807", "..", "1.0000000000000000001E", "+ 5"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseSize(s)
		if n < 0 || (err == nil) == (errors.Is(err, errSizeSyntax) || errors.Is(err, errSizeRange)) {
			t.Errorf("parseSize(%q) = %d, %v", s, n, err)
		}
	})
}
