//go:build !linux

package bench

import (
	"errors"
	"fmt"
)

// ProcessMeter measures the CPU time and the memory of a process of this machine.
func ProcessMeter(pid int) (Meter, error) {
	return nil, fmt.Errorf("measuring process %d needs Linux: %w", pid, errors.ErrUnsupported)
}
