package crashlab

import (
	"encoding/json"
	"math"
	"math/big"
	"testing"

	"pgregory.net/rapid"
)

// TestCountIsANumber compares counts with big integers.
func TestCountIsANumber(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, want := CountOf(1), big.NewInt(1)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			n := rapid.OneOf(rapid.Uint64Range(0, 5), rapid.Uint64()).Draw(t, "n")
			bn := new(big.Int).SetUint64(n)
			switch rapid.IntRange(0, 3).Draw(t, "what") {
			case 0:
				c, want = c.add(CountOf(n)), want.Add(want, bn)
			case 1:
				if twice := new(big.Int).Lsh(bn, 1); twice.Cmp(want) <= 0 { // more would drown in a logarithm's precision
					c, want = c.sub(CountOf(n)), want.Sub(want, bn)
				}
			default:
				c, want = c.mul(CountOf(n)), want.Mul(want, bn)
			}
		}
		if n, exact := c.Exact(); exact && (!want.IsUint64() || want.Uint64() != n) && want.BitLen() < 60 {
			t.Fatalf("%d: want %s", n, want)
		}
		f, _ := new(big.Float).SetInt(want).Float64()
		if want.Sign() > 0 && !math.IsInf(f, 0) && math.Abs(c.Log2()-math.Log2(f)) > 1e-6*math.Abs(math.Log2(f))+1e-6 {
			t.Fatalf("2^%g: want 2^%g", c.Log2(), math.Log2(f))
		}
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var back Count
		if err := json.Unmarshal(text, &back); err != nil {
			t.Fatal(err)
		}
		if c.Log2() < maxLog2 && math.Abs(back.Log2()-c.Log2()) > 1e-9*c.Log2() {
			t.Fatalf("%s came back as 2^%g: want 2^%g", text, back.Log2(), c.Log2())
		}
		var number float64
		if err := json.Unmarshal(text, &number); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
	})
}

func TestCountText(t *testing.T) {
	big := CountOf(math.MaxInt64).mul(CountOf(2))
	for want, c := range map[string]Count{"0": {}, "12": CountOf(12), "about 2^64.0": big} {
		if got := c.String(); got != want {
			t.Errorf("%q: want %q", got, want)
		}
	}
	huge := CountOf(1)
	for range 200 {
		huge = huge.mul(CountOf(1 << 62))
	}
	if huge.Log2() != 200*62 {
		t.Errorf("2^%g", huge.Log2())
	}
	if diff := big.sub(big); diff != (Count{}) {
		t.Errorf("a count minus itself is %s", diff)
	}
	if rest := big.sub(CountOf(math.MaxInt64)); math.Abs(rest.Log2()-63) > 1e-6 {
		t.Errorf("2^64-2^63 is %s", rest)
	}
	var c Count
	for _, bad := range []string{`"x"`, `-1`, `1.5`} {
		if json.Unmarshal([]byte(bad), &c) == nil {
			t.Errorf("%s was taken for a count", bad)
		}
	}
}

func FuzzCountJSON(f *testing.F) {
	f.Add([]byte("0"))
	f.Add([]byte("99999999999999999999999"))
	f.Fuzz(func(t *testing.T, text []byte) {
		var c Count
		if c.UnmarshalJSON(text) == nil && (math.IsNaN(c.Log2()) || c.Log2() < 0 && c != (Count{})) {
			t.Errorf("%q is 2^%g", text, c.Log2())
		}
	})
}
