package crashlab

import (
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"math/bits"
)

// Count is a number of states: exact up to 2^63-1, beyond that its logarithm. The zero value is 0.
type Count struct {
	n    uint64
	log2 float64 // valid where big
	big  bool
}

// maxExact is the largest count that is kept exactly.
const maxExact = math.MaxInt64

// CountOf returns n as a Count.
func CountOf(n uint64) Count {
	if n > maxExact {
		return Count{big: true, log2: math.Log2(float64(n))}
	}
	return Count{n: n}
}

// Exact returns the count and true where it is known exactly.
func (c Count) Exact() (uint64, bool) { return c.n, !c.big }

// Log2 is the base-2 logarithm of the count, -Inf for 0.
func (c Count) Log2() float64 {
	if c.big {
		return c.log2
	}
	return math.Log2(float64(c.n))
}

func (c Count) mul(d Count) Count {
	if !c.big && !d.big {
		if hi, lo := bits.Mul64(c.n, d.n); hi == 0 && lo <= maxExact {
			return Count{n: lo}
		}
	}
	if (!c.big && c.n == 0) || (!d.big && d.n == 0) {
		return Count{}
	}
	return Count{big: true, log2: c.Log2() + d.Log2()}
}

func (c Count) add(d Count) Count {
	if !c.big && !d.big {
		return CountOf(c.n + d.n)
	}
	high, low := max(c.Log2(), d.Log2()), min(c.Log2(), d.Log2())
	return Count{big: true, log2: high + math.Log2(1+math.Exp2(low-high))}
}

// sub returns c-d; d is at most c. Where the difference drowns in the precision of a logarithm it is 0.
func (c Count) sub(d Count) Count {
	if !c.big {
		return Count{n: c.n - min(c.n, d.n)}
	}
	rest := 1 - math.Exp2(d.Log2()-c.log2)
	if rest <= 0 {
		return Count{}
	}
	log := c.log2 + math.Log2(rest)
	if log < 62 {
		return Count{n: uint64(math.Exp2(log))}
	}
	return Count{big: true, log2: log}
}

// String returns the exact number, or "about 2^N".
func (c Count) String() string {
	if c.big {
		return fmt.Sprintf("about 2^%.1f", c.log2)
	}
	return fmt.Sprint(c.n)
}

// MarshalJSON writes an integer, rounded to about 15 digits beyond 2^63.
func (c Count) MarshalJSON() ([]byte, error) {
	if !c.big {
		return json.Marshal(c.n)
	}
	whole := math.Floor(c.log2)
	const digits = 52
	n := new(big.Int).SetUint64(uint64(math.Round(math.Exp2(c.log2 - whole + digits))))
	if whole > maxLog2 {
		whole = maxLog2
	}
	return n.Lsh(n, uint(whole)-digits).MarshalJSON()
}

// maxLog2 keeps a count in JSON within what a reader's float64 holds; beyond it the number is that bound, and
// states_possible_log2 tells the rest.
const maxLog2 = 1022

// UnmarshalJSON is the reverse of MarshalJSON.
func (c *Count) UnmarshalJSON(text []byte) error {
	n, ok := new(big.Int).SetString(string(text), 10)
	if !ok || n.Sign() < 0 {
		return fmt.Errorf("count %q: want a whole number", text)
	}
	if n.IsInt64() {
		*c = Count{n: n.Uint64()}
		return nil
	}
	mant := new(big.Float)
	exp := new(big.Float).SetInt(n).MantExp(mant)
	m, _ := mant.Float64()
	*c = Count{big: true, log2: float64(exp) + math.Log2(m)}
	return nil
}
