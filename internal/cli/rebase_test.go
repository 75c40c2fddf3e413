package cli

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// chainSetup adds to the images of oracleDir chains that are committed and rebased: overlays shorter and longer than
// what they lie over, zeros in one layer over data in another, versions and subclusters.
const chainSetup = `
qemu-img create -q -f qcow2 b1.qcow2 4M
qemu-io -c "write -P1 0 2M" -c "write -P2 3M 1M" b1.qcow2
qemu-img create -q -f raw b2.raw 2M
qemu-io -f raw -c "write -P1 0 1M" -c "write -P3 1M 512k" b2.raw
qemu-img create -q -f raw b3.raw 5000192
qemu-io -f raw -c "write -P9 0 5000192" b3.raw
qemu-img create -q -f qcow2 -b b1.qcow2 -F qcow2 m1.qcow2 3M
qemu-io -c "write -P4 64k 1k" -c "write -z 512k 128k" -c "write -z 2M 64k" m1.qcow2
for i in 1 2 3 4 5 6 7 8 9; do
	qemu-img create -q -f qcow2 -b m1.qcow2 -F qcow2 t$i.qcow2 6M
	qemu-io -c "write -P5 100k 200k" -c "write -z 1M 64k" -c "write -P6 5M 3k" t$i.qcow2
done
qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k -b b2.raw -F raw old1.qcow2 3M
qemu-io -c "write -P5 100k 20k" -c "write -z 512k 32k" -c "write -P6 2M 3k" old1.qcow2
cp old1.qcow2 old2.qcow2
qemu-img create -q -f qcow2 -o extended_l2=on -b b1.qcow2 -F qcow2 sub1.qcow2
qemu-io -c "write -P5 100k 20k" -c "write -z 512k 6k" -c "write -P6 3500k 3k" sub1.qcow2
cp sub1.qcow2 sub2.qcow2
cp sub1.qcow2 sub3.qcow2
qemu-img create -q -f qcow2 -b b1.qcow2 -F qcow2 snapped.qcow2
qemu-io -c "write -P5 100k 20k" snapped.qcow2
qemu-img snapshot -c one snapped.qcow2
qemu-io -c "write -P6 100k 20k" -c "write -P7 1M 128k" snapped.qcow2
qemu-img create -q -f qcow2 alone.qcow2 3M
qemu-io -c "write -P5 100k 20k" alone.qcow2
qemu-img create -q -f qcow2 -F raw -b 'json:{"driver":"raw","offset":524288,"size":1048576,"file":{"driver":"file","filename":"b2.raw"}}' part.qcow2 1M
qemu-img create -q -f qcow2 -o cluster_size=512 -b b1.qcow2 -F qcow2 tiny.qcow2
`

var dates = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`)

func chainDir(t *testing.T) string {
	t.Helper()
	dir := oracleDir(t)
	cmd := exec.Command("sh", "-e", "-c", chainSetup)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup: %v\n%s", err, out)
	}
	return dir
}

// TestCommitAndRebaseAsQemuImg runs the same command lines with both programs, one after the other on the same
// images, and compares what they print, the overlay, and every file below it.
func TestCommitAndRebaseAsQemuImg(t *testing.T) {
	theirs, ours := chainDir(t), chainDir(t)
	long, longest := strings.Repeat("n", 480), strings.Repeat("n", 1023)
	for _, tt := range []struct {
		line    string
		files   []string // to compare as disks, and to describe
		damaged bool     // the chain cannot be opened any more
	}{
		{"rebase -b b1.qcow2 -F qcow2 t1.qcow2", []string{"t1.qcow2"}, false},
		{"rebase -b b2.raw -F raw t2.qcow2", []string{"t2.qcow2"}, false},
		{"rebase -b b3.raw -F raw t3.qcow2", []string{"t3.qcow2"}, false},
		{"rebase -b b3.raw -F raw -q -t none -T none t4.qcow2", []string{"t4.qcow2"}, false},
		{"rebase -b '' t5.qcow2", []string{"t5.qcow2"}, false},
		{"rebase -f qcow2 -b m1.qcow2 -F qcow2 t5.qcow2", []string{"t5.qcow2"}, false},
		{"rebase -b b3.raw -F raw alone.qcow2", []string{"alone.qcow2"}, false},
		{"rebase -b b3.raw -F raw old2.qcow2", []string{"old2.qcow2"}, false},
		{"rebase -b b3.raw -F raw sub2.qcow2", []string{"sub2.qcow2"}, false},
		{"rebase -b '' sub3.qcow2", []string{"sub3.qcow2"}, false},
		{"rebase -u -b b1.qcow2 -F qcow2 t6.qcow2", []string{"t6.qcow2"}, false},
		{"rebase -u -b m1.qcow2 -F qcow2 t6.qcow2", []string{"t6.qcow2"}, false},
		{"rebase -u -b '' -F qcow2 t6.qcow2", []string{"t6.qcow2"}, false},
		{"rebase -u t6.qcow2", []string{"t6.qcow2"}, false},
		{"rebase -u -b nope.qcow2 -F qcow2 t6.qcow2", []string{"t6.qcow2"}, true},
		{"rebase -u -b " + longest + " -F qcow2 t6.qcow2", []string{"t6.qcow2"}, true},
		{"rebase -u -b b1.qcow2 -F qcow2 t6.qcow2", []string{"t6.qcow2"}, false},

		{"rebase -b b2.raw -F raw part.qcow2", []string{"part.qcow2"}, false},

		{"commit t1.qcow2", []string{"t1.qcow2", "b1.qcow2"}, false},
		{"commit -d t7.qcow2", []string{"t7.qcow2", "m1.qcow2"}, false},
		{"commit -q -b b1.qcow2 t8.qcow2", []string{"t8.qcow2", "b1.qcow2"}, false},
		{"commit -b m1.qcow2 -r 100M t9.qcow2", []string{"t9.qcow2", "m1.qcow2"}, false},
		{"commit -t writethrough -f qcow2 old1.qcow2", []string{"old1.qcow2", "b2.raw"}, false},
		{"commit -t unsafe sub1.qcow2", []string{"sub1.qcow2", "b1.qcow2"}, false},
		{"commit snapped.qcow2", []string{"snapped.qcow2", "b1.qcow2"}, false},
		{"commit snapped.qcow2", []string{"snapped.qcow2", "b1.qcow2"}, false},

		{"rebase", nil, false},
		{"rebase a b", nil, false},
		{"rebase t1.qcow2", nil, false},
		{"rebase -b b1.qcow2 nope.qcow2", nil, false},
		{"rebase -b nope.qcow2 -F qcow2 t1.qcow2", nil, false},
		{"rebase -b b1.qcow2 t1.qcow2", nil, false},
		{"rebase -u -b b1.qcow2 t1.qcow2", nil, false},
		{"rebase -b b1.qcow2 -F foo t1.qcow2", nil, false},
		{"rebase -u -b b1.qcow2 -F foo t1.qcow2", nil, false},
		{"rebase -t foo -b b1.qcow2 -F qcow2 t1.qcow2", nil, false},
		{"rebase -T foo -b b1.qcow2 -F qcow2 t1.qcow2", nil, false},
		{"rebase -u -b " + long + " -F qcow2 tiny.qcow2", nil, false},
		{"rebase -f raw -b b1.qcow2 -F qcow2 b3.raw", nil, false},
		{"rebase -f raw -u -b b1.qcow2 -F qcow2 b3.raw", nil, false},
		{"commit", nil, false},
		{"commit a b", nil, false},
		{"commit nope.qcow2", nil, false},
		{"commit -t foo t1.qcow2", nil, false},
		{"commit -r foo t1.qcow2", nil, false},
		{"commit -f raw b3.raw", nil, false},
		{"commit alone2.qcow2", nil, false},
		{"commit -b nope.qcow2 t1.qcow2", nil, false},
		{"commit -b t1.qcow2 t1.qcow2", nil, false},
		{"commit empty.qcow2", nil, false},
	} {
		t.Run(tt.line[:min(len(tt.line), 70)], func(t *testing.T) {
			args := splitLine(tt.line)
			compareOutcomes(t, runQemuImg(t, theirs, args...), runHere(t, ours, args...))
			for _, file := range tt.files {
				their := dates.ReplaceAllString(describeImage(t, theirs, file), "")
				our := dates.ReplaceAllString(describeImage(t, ours, file), "")
				if our != their {
					t.Errorf("the image is\n%s\nafter qemu-img\n%s", our, their)
				}
				if tt.damaged {
					continue
				}
				testenv.Run(t, "qemu-img", "compare", filepath.Join(theirs, file), filepath.Join(ours, file))
				if strings.HasSuffix(file, ".qcow2") {
					testenv.Run(t, "qemu-img", "check", "-q", filepath.Join(ours, file))
				}
			}
		})
	}
}
