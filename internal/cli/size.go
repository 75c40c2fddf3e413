package cli

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"
)

var (
	errSizeSyntax = errors.New("not a size: expected a number of bytes, with a suffix k, M, G, T, P or E if you like")
	errSizeRange  = fmt.Errorf("the size is not between 0 and %d", int64(math.MaxInt64))
)

// parseSize reads a number of bytes as qemu-img does: decimal, with a suffix b, k, M, G, T, P or E of either
// case (powers of 1024) and, before a suffix above b, a fraction; or hexadecimal after 0x.
// The result is between 0 and 2^63-1. Errors are errSizeSyntax and errSizeRange.
func parseSize(s string) (int64, error) {
	s = strings.TrimPrefix(strings.TrimLeft(s, " \t\n\v\f\r"), "+")
	if hex, ok := cutHexPrefix(s); ok {
		n, err := strconv.ParseUint(hex, 16, 64)
		switch {
		case errors.Is(err, strconv.ErrRange) || n > math.MaxInt64:
			return 0, errSizeRange
		case err != nil || strings.Contains(hex, "_"):
			return 0, errSizeSyntax
		}
		return int64(n), nil
	}
	digits := leadingDigits(s)
	rest := s[len(digits):]
	fraction := ""
	if strings.HasPrefix(rest, ".") {
		fraction = leadingDigits(rest[1:])
		rest = rest[1+len(fraction):]
	}
	shift, ok := suffixShift(rest)
	if digits == "" || !ok || len(s) > 64 {
		return 0, errSizeSyntax
	}
	value, _ := new(big.Rat).SetString(digits + "." + fraction + "0")
	if shift == 0 && !value.IsInt() {
		return 0, errSizeSyntax
	}
	value.Mul(value, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), shift)))
	n := new(big.Int).Quo(value.Num(), value.Denom())
	if !n.IsInt64() {
		return 0, errSizeRange
	}
	return n.Int64(), nil
}

func cutHexPrefix(s string) (string, bool) {
	if len(s) > 2 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X') {
		return s[2:], true
	}
	return "", false
}

func leadingDigits(s string) string {
	n := 0
	for n < len(s) && s[n] >= '0' && s[n] <= '9' {
		n++
	}
	return s[:n]
}

// suffixShift returns the power of two that a size suffix stands for.
func suffixShift(s string) (uint, bool) {
	if s == "" {
		return 0, true
	}
	i := strings.Index("bkmgtpe", strings.ToLower(s))
	if i < 0 || len(s) != 1 {
		return 0, false
	}
	return uint(i) * 10, true
}

// sizeError is what qemu-img prints, over two lines, for a size that is none.
type sizeError struct {
	what string // what was to be given: "image size", "start offset"
	err  error
}

func (e *sizeError) Error() string {
	if errors.Is(e.err, errSizeRange) {
		return fmt.Sprintf("Invalid %s specified. Must be between 0 and %d.", e.what, int64(math.MaxInt64))
	}
	return fmt.Sprintf("Invalid %s specified. You may use k, M, G, T, P or E suffixes for\n"+
		"kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.", e.what)
}

func (e *sizeError) Unwrap() error { return e.err }

// sizeArgument is parseSize for an argument, with the error that qemu-img prints.
func sizeArgument(what, s string) (int64, error) {
	n, err := parseSize(s)
	if err != nil {
		return 0, &sizeError{what, err}
	}
	return n, nil
}

// sizeParameter is parseSize for a named parameter of an option list.
func sizeParameter(name, s string) (int64, error) {
	n, err := parseSize(s)
	if err != nil {
		return 0, fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64\n"+
			"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"+
			"and exabytes, respectively.", name)
	}
	return n, nil
}

// formatSize prints a number of bytes for people, with three significant digits: 1.5 GiB.
func formatSize(n int64) string {
	units := [...]string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	v, i := float64(n), 0
	for v >= 1000 && i < len(units)-1 {
		v /= 1024
		i++
	}
	return strconv.FormatFloat(v, 'g', 3, 64) + " " + units[i]
}
