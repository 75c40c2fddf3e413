package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/platter-disk/platter/internal/testenv"
)

// outcome is what a command line comes to.
type outcome struct {
	stdout, stderr string
	status         int
}

// runHere runs a command line in this process, in the given directory.
func runHere(t *testing.T, dir string, args ...string) outcome {
	t.Helper()
	t.Chdir(dir)
	var stdout, stderr bytes.Buffer
	status := run(t.Context(), args, &stdout, &stderr)
	return outcome{stdout.String(), stderr.String(), status}
}

// runQemuImg runs the same command line with qemu-img.
func runQemuImg(t *testing.T, dir string, args ...string) outcome {
	t.Helper()
	cmd := exec.Command("qemu-img", args...)
	cmd.Dir = dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, failed := err.(*exec.ExitError); err != nil && !failed {
		t.Fatal(err)
	}
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

var (
	hintLine  = regexp.MustCompile(`(?m)^Try '(qemu-img|platter)[^']*' for more information\n`)
	details   = regexp.MustCompile(` \([^()\n]*: found [^()\n]*, expected [^()\n]*\)|: the image format is not supported`)
	openTwice = regexp.MustCompile(`Could not open ('[^'\n]*'): Could not open ('[^'\n]*'):`)
)

// normalize makes what both programs print on standard error comparable: the name of the program, where help
// is to be found, the details that Platter adds, and that qemu-img says twice that a file could not be opened.
func normalize(s string) string {
	s = strings.ReplaceAll(s, "qemu-img: ", "platter: ")
	s = hintLine.ReplaceAllString(s, "")
	s = strings.TrimSuffix(details.ReplaceAllString(s, ""), "\n")
	return openTwice.ReplaceAllStringFunc(s, func(m string) string {
		names := openTwice.FindStringSubmatch(m)
		if names[1] == names[2] {
			return "Could not open " + names[1] + ":"
		}
		return m
	})
}

// sameText compares printed text, or what it means where both are JSON.
func sameText(a, b string) bool {
	var x, y any
	if json.Unmarshal([]byte(a), &x) == nil && json.Unmarshal([]byte(b), &y) == nil {
		return reflect.DeepEqual(x, y)
	}
	return a == b
}

func compareOutcomes(t *testing.T, want, got outcome) {
	t.Helper()
	want.stderr, got.stderr = normalize(want.stderr), normalize(got.stderr)
	if want.status != got.status {
		t.Errorf("exit status %d, qemu-img %d", got.status, want.status)
	}
	if !sameText(want.stdout, got.stdout) {
		t.Errorf("standard output\n%s\nqemu-img\n%s", got.stdout, want.stdout)
	}
	if want.stderr != got.stderr {
		t.Errorf("standard error\n%s\nqemu-img\n%s", got.stderr, want.stderr)
	}
}

// oracleSetup makes images with QEMU's own tools. Each line is a command.
const oracleSetup = `
qemu-img create -q -f qcow2 empty.qcow2 1M
qemu-img create -q -f raw empty.raw 1M
qemu-img create -q -f raw empty2.raw 2M
qemu-img create -q -f qcow2 base.qcow2 4M
qemu-io -c "write -P1 0 128k" -c "write -z 256k 64k" -c "write -P 3 1M 64k" base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 8M
qemu-io -c "write -P2 64k 64k" -c "write -z 512k 64k" -c "write -z -u 1M 64k" -c "write -P5 5M 100k" top.qcow2
qemu-img create -q -f raw data.raw 1M
qemu-io -f raw -c "write -P7 64k 64k" data.raw
qemu-img create -q -f qcow2 -b data.raw -F raw overraw.qcow2 2M
qemu-io -c "write -P8 192k 1k" overraw.qcow2
qemu-img convert -c -O qcow2 base.qcow2 packed.qcow2
qemu-img create -q -f qcow2 -o data_file=ext.data,data_file_raw=on ext.qcow2 1M
qemu-io -c "write -P9 192k 64k" ext.qcow2
qemu-img create -q -f qcow2 -o extended_l2=on,compression_type=zstd,lazy_refcounts=on sub.qcow2 1M
qemu-io -c "write 192k 2k" -c "write 196k 4k" -c "write -z 208k 2k" sub.qcow2
qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k old.qcow2 1M
qemu-img create -q -f qcow2 -o cluster_size=4k maps.qcow2 1G
qemu-img bitmap --add -g 512 maps.qcow2 fine
qemu-img bitmap --add maps.qcow2 a-rather-long-name-of-a-bitmap
qemu-img create -q -f qcow2 snap.qcow2 64M
qemu-img snapshot -c first snap.qcow2
qemu-img snapshot -c "a snapshot with a long name" snap.qcow2
qemu-img bitmap --add snap.qcow2 bm0
qemu-img bitmap --add --disable -g 4k snap.qcow2 bm1
qemu-img create -q -f qcow2 -u -b sub/nope.qcow2 -F qcow2 orphan.qcow2 1G
qemu-img create -q -f qcow2 -b ../base.qcow2 -F qcow2 dir/deep.qcow2
qemu-img create -q -f raw text.raw 1M
qemu-io -f raw -c "write -P 120 70000 1" text.raw
qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encryption=on,encrypt.key-secret=s secret.qcow2 1M
qemu-img create -q -f qcow2 -o data_file=gone.data nodata.qcow2 1M
rm gone.data
cp base.qcow2 leak.qcow2
printf '\0\1' | dd of=leak.qcow2 bs=1 seek=131112 conv=notrunc status=none
truncate -s 1376256 leak.qcow2
cp base.qcow2 wrong.qcow2
printf '\0\0' | dd of=wrong.qcow2 bs=1 seek=131082 conv=notrunc status=none
cp leak.qcow2 leak2.qcow2
`

// oracleDir makes a directory of test images.
func oracleDir(t *testing.T) string {
	t.Helper()
	testenv.Need(t, "qemu-img", "qemu-io", "sh")
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "dir"), 0o777); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-e", "-c", oracleSetup)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("setup: %v\n%s", err, out)
	}
	return dir
}

// TestSameAsQemuImg runs command lines that change nothing with both programs on the same images.
func TestSameAsQemuImg(t *testing.T) {
	dir := oracleDir(t)
	for _, line := range []string{
		"info empty.qcow2", "info --output=json empty.qcow2", "info -f qcow2 top.qcow2", "info --output=json top.qcow2",
		"info --backing-chain top.qcow2", "info --backing-chain --output=json top.qcow2",
		"info empty.raw", "info --output=json empty.raw", "info -f raw base.qcow2", "info overraw.qcow2",
		"info --backing-chain overraw.qcow2", "info packed.qcow2", "info ext.qcow2", "info --output=json ext.qcow2",
		"info sub.qcow2", "info --output=json sub.qcow2", "info old.qcow2", "info --output=json old.qcow2",
		"info snap.qcow2", "info --output=json snap.qcow2", "info orphan.qcow2", "info --output=json orphan.qcow2",
		"info dir/deep.qcow2", "info --backing-chain dir/deep.qcow2", "info --backing-chain --output=json dir/deep.qcow2",
		"info --image-opts driver=qcow2,file.filename=top.qcow2", "info -U top.qcow2", "info nodata.qcow2",
		"info --image-opts file.filename=top.qcow2",
		`info json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}`,
		"info nope", "info", "info a b", "info -f foo empty.raw", "info -f qcow2 empty.raw", "info --output=xml empty.raw",
		"info --bogus", "info -f", "info --format", "info --image-opts -f qcow2 x", "info foo:bar", "info ''",

		"map base.qcow2", "map --output=json base.qcow2", "map top.qcow2", "map --output=json top.qcow2",
		"map -f raw data.raw", "map --output=json data.raw", "map overraw.qcow2", "map --output=json overraw.qcow2",
		"map --output=json packed.qcow2", "map ext.qcow2", "map sub.qcow2", "map empty.qcow2", "map --output=json empty.qcow2",
		"map -s 60k -l 100k --output=json top.qcow2", "map --start-offset=60000 --max-length=100000 --output=json top.qcow2",
		"map --start-offset=60k --max-length=100k top.qcow2", "map --start-offset=100M top.qcow2", "map --start-offset=100M --output=json top.qcow2",
		"map --start-offset=8M --output=json top.qcow2", "map --start-offset=foo top.qcow2", "map --max-length=foo top.qcow2",
		"map", "map a b", "map nope", "map --output=yaml top.qcow2", "map -U --output=json dir/deep.qcow2",

		"check empty.qcow2", "check base.qcow2", "check top.qcow2", "check --output=json base.qcow2", "check packed.qcow2",
		"check ext.qcow2", "check sub.qcow2", "check old.qcow2", "check snap.qcow2", "check -q base.qcow2",
		"check --output=json packed.qcow2", "check empty.raw", "check -f raw base.qcow2", "check --output=json empty.raw",
		"check nope", "check", "check a b", "check -r foo base.qcow2", "check -T foo base.qcow2", "check -U base.qcow2",
		"check leak.qcow2", "check -q leak.qcow2", "check --output=json leak.qcow2",
		"check wrong.qcow2", "check -q wrong.qcow2", "check --output=json wrong.qcow2",
		"check -f qcow2 empty.raw", "check --image-opts driver=qcow2,file.filename=base.qcow2",

		"compare empty.raw empty.qcow2", "compare empty.raw empty2.raw", "compare empty2.raw empty.raw",
		"compare -s empty.raw empty2.raw", "compare -s empty.raw empty.qcow2", "compare -q empty.raw empty2.raw",
		"compare text.raw empty.raw", "compare empty.qcow2 text.raw", "compare -q text.raw empty.raw",
		"compare -s text.raw empty.qcow2", "compare base.qcow2 packed.qcow2", "compare -s packed.qcow2 packed.qcow2",
		"compare base.qcow2 top.qcow2", "compare text.raw empty2.raw", "compare empty.raw nope", "compare nope empty.raw",
		"compare empty.raw", "compare a b c", "compare -f qcow2 empty.raw empty2.raw", "compare -F qcow2 empty.raw empty2.raw",
		"compare -f raw -F raw empty.raw empty.raw", "compare -T foo empty.raw empty.raw", "compare -U top.qcow2 top.qcow2",
		"compare --image-opts driver=raw,file.filename=empty.raw driver=qcow2,file.filename=empty.qcow2",
		"convert", "convert empty.raw", "convert nope x.raw", "convert -f qcow2 empty.raw x.raw", "convert -S abc empty.raw x.raw",
		"convert -S 1000 empty.raw x.raw", "convert -S 32M empty.raw x.raw", "convert -m 0 empty.raw x.raw",
		"convert -m 17 empty.raw x.raw", "convert -r abc empty.raw x.raw", "convert -O foo empty.raw x.raw",
		"convert -t foo empty.raw x.raw", "convert -T foo empty.raw x.raw", "convert --target-is-zero empty.raw x.raw",
		"convert --target-image-opts empty.raw driver=raw,file.filename=x.raw", "convert -c -O raw empty.raw x.raw",
		"convert -n empty2.raw data.raw", "convert -n empty.raw x.raw", "convert -n -o size=8M -O qcow2 empty.raw empty.qcow2",
		"convert -o foo=1 -O qcow2 empty.raw x.qcow2", "convert -o cluster_size=3k -O qcow2 empty.raw x.qcow2",
		"convert -B base.qcow2 -O qcow2 top.qcow2 x.qcow2", "convert -B base.qcow2 -O raw top.qcow2 x.raw",
		"convert -F qcow2 -O raw top.qcow2 x.raw", "convert -B base.qcow2 -F qcow2 -O qcow2 empty.raw data.raw x.qcow2",
		"convert empty.raw nodir/x.raw", "convert -C -S 4k empty.raw x.raw", "convert --skip-broken-bitmaps empty.raw x.raw",
		"convert -n --target-is-zero empty.raw overraw.qcow2", "convert --image-opts -f raw empty.raw x.raw", "convert -6 a b",

		"measure", "measure a b", "measure --size 1G empty.raw", "measure --size=", "measure --size x", "measure --size 9E", "measure -f raw --size 1",
		"measure -l s --size 1", "measure --output=foo --size 1", "measure -O nope --size 1", "measure -O qcow2 -o cluster_size=3k --size 1",
		"measure -O qcow2 nope", "measure -O qcow2 -l nope base.qcow2", "measure --size 1001", "measure -O qcow2 --size 0", "measure -O qcow2 --size 1001",
		"measure -O qcow2 --size 17T", "measure -O qcow2 -o cluster_size=512 --size 100G", "measure -O qcow2 -o refcount_bits=1 --size 1T",
		"measure -O qcow2 -o extended_l2=on --size 1T", "measure -O qcow2 -o preallocation=metadata --size 10G", "measure -O qcow2 -o preallocation=full --size 10G",
		"measure -O qcow2 -o data_file=x.raw,data_file_raw=on --size 10G", "measure -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 --size 10G",
		"measure empty.qcow2", "measure -O qcow2 data.raw", "measure -O qcow2 -o cluster_size=4k data.raw", "measure -O qcow2 base.qcow2",
		"measure --output=json -O qcow2 base.qcow2", "measure -O qcow2 top.qcow2", "measure -O qcow2 -o size=7G top.qcow2",
		"measure -O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2", "measure -O qcow2 -o compat=0.10 top.qcow2",
		"measure -O qcow2 --image-opts driver=qcow2,file.filename=base.qcow2", "measure -U --output=json empty.raw",
		"measure -O qcow2 packed.qcow2", "measure -O qcow2 old.qcow2", "measure -O qcow2 -f raw old.qcow2",
		"measure -O qcow2 sub.qcow2", "measure -O qcow2 -o extended_l2=on sub.qcow2", "measure -O qcow2 ext.qcow2", "measure -O qcow2 maps.qcow2",
		"measure --output=json -O qcow2 -o cluster_size=512 maps.qcow2", "measure -O qcow2 -o compat=0.10 maps.qcow2", "measure maps.qcow2",

		"resize", "resize empty.raw", "resize nope 1G", "resize empty.raw 1 2", "resize --preallocation=foo empty.qcow2 2M",
		"resize empty.qcow2 abc", "resize empty.qcow2 +", "resize empty.qcow2 0", "resize --shrink empty.qcow2 -20G",
		"resize --preallocation=full empty.qcow2 512k", "resize empty.qcow2 9E",

		"create", "create -f qcow2", "create -f foo x 1G", "create -f qcow2 x", "create -f qcow2 x abc", "create -f qcow2 x 1k 2k",
		"create -f qcow2 x 10kB", "create -f qcow2 x 1000000E", "create -f qcow2 -o size=1G x 2G", "create -f qcow2 -o blah=1 x 1G",
		"create -f qcow2 -o cluster_size=abc x 1G", "create -f qcow2 -o refcount_bits=abc x 1G",
		"create -f qcow2 -o lazy_refcounts=foo x 1G", "create -f raw -b empty.raw -F raw x 1M",
		"create -f raw -F raw x 1M", "create -f qcow2 -b nope.qcow2 -F qcow2 x", "create -f qcow2 -b nope.qcow2 -F qcow2 x 1G",
		"create -f qcow2 -b base.qcow2 x", "create -f qcow2 -u -b nope.qcow2 -F qcow2 x", "create -f qcow2 -u -b nope.qcow2 x 1G",
		"create -f qcow2 -b base.qcow2 -F qcow2 base.qcow2", "create -f qcow2 -o '' x 1M",
		"create --bogus", "create -f",
	} {
		t.Run(line, func(t *testing.T) {
			args := splitLine(line)
			compareOutcomes(t, runQemuImg(t, dir, args...), runHere(t, dir, args...))
		})
	}
}

// splitLine splits a command line at spaces; ” in it stands for an empty argument.
func splitLine(line string) []string {
	args := strings.Fields(line)
	for i, a := range args {
		if a == "''" {
			args[i] = ""
		}
	}
	return args
}

// TestSameChangesAsQemuImg runs command lines that write with both programs, each in a directory of its own,
// and then compares what they printed and what became of the files.
func TestSameChangesAsQemuImg(t *testing.T) {
	theirs, ours := oracleDir(t), oracleDir(t)
	for _, tt := range []struct {
		line string
		file string // what the line writes
	}{
		{"create -f qcow2 n1.qcow2 10G", "n1.qcow2"},
		{"create n2.raw 1.5G", "n2.raw"},
		{"create -q -f raw n3.raw 1M", "n3.raw"},
		{"create -f qcow2 -o cluster_size=4k,compat=0.10 n4.qcow2 1M", "n4.qcow2"},
		{"create -f qcow2 -b base.qcow2 -F qcow2 n5.qcow2", "n5.qcow2"},
		{"create -f qcow2 -o backing_file=data.raw,backing_fmt=raw n6.qcow2 3M", "n6.qcow2"},
		{"create -f qcow2 -u -b nope.qcow2 -F qcow2 n7.qcow2 1G", "n7.qcow2"},
		{"create -f qcow2 -o extended_l2=on,compression_type=zstd,lazy_refcounts,refcount_bits=32 n8.qcow2 0x200000", "n8.qcow2"},
		{"create -f qcow2 -o data_file=n9.data,data_file_raw=on n9.qcow2 1M", "n9.qcow2"},
		{"create -f qcow2 -o preallocation=metadata -o size=1M n10.qcow2", "n10.qcow2"},
		{"create -f qcow2 n11.qcow2 1001", "n11.qcow2"},
		{"create -f raw -o preallocation=falloc n12.raw 1001", "n12.raw"},

		{"resize n1.qcow2 20G", "n1.qcow2"},
		{"resize n1.qcow2 +1.5G", "n1.qcow2"},
		{"resize -q n1.qcow2 30G", "n1.qcow2"},
		{"resize -f raw n3.raw +1M", "n3.raw"},
		{"resize n3.raw 3M", "n3.raw"},
		{"resize n3.raw -1M", "n3.raw"},
		{"resize --shrink -f raw n3.raw -1M", "n3.raw"},
		{"resize --shrink n1.qcow2 25G", "n1.qcow2"},
		{"resize --shrink n5.qcow2 -64k", "n5.qcow2"},
		{"resize --shrink n9.qcow2 100k", "n9.qcow2"},
		{"resize --preallocation=metadata n10.qcow2 2M", "n10.qcow2"},
		{"resize --image-opts driver=qcow2,file.filename=n1.qcow2 +64k", "n1.qcow2"},

		{"check -r leaks empty.qcow2", "empty.qcow2"},
		{"check -r leaks leak.qcow2", "leak.qcow2"},
		{"check -q --repair all leak2.qcow2", "leak2.qcow2"},
		{"check -r leaks wrong.qcow2", "base.qcow2"},

		{"convert text.raw v1.raw", "v1.raw"},
		{"convert -O qcow2 text.raw v2.qcow2", "v2.qcow2"},
		{"convert -O qcow2 -o cluster_size=4k text.raw v3.qcow2", "v3.qcow2"},
		{"convert -S 64k text.raw v4.raw", "v4.raw"},
		{"convert -S 0 -O qcow2 text.raw v5.qcow2", "v5.qcow2"},
		{"convert -O raw top.qcow2 v6.raw", "v6.raw"},
		{"convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 v7.qcow2", "v7.qcow2"},
		{"convert -c -O qcow2 top.qcow2 v8.qcow2", "v8.qcow2"},
		{"convert -n -O qcow2 text.raw v8.qcow2", "v8.qcow2"},
		{"convert -n text.raw v1.raw", "v1.raw"},
		{"convert text.raw data.raw v9.raw", "v9.raw"},
		{"convert -o size=8M text.raw v10.raw", "v10.raw"},
		{"convert -W -m 4 -f raw -O qcow2 -t directsync -T writeback text.raw v11.qcow2", "v11.qcow2"},
		{"convert -n --target-image-opts text.raw driver=raw,file.filename=v1.raw", "v1.raw"},
		{"convert -r 100M -q -p text.raw v12.raw", "v12.raw"},
		{"convert -O qcow2 -o preallocation=metadata text.raw v13.qcow2", "v13.qcow2"},
		{"convert -O qcow2 -o data_file=v14.data,data_file_raw=on text.raw v14.qcow2", "v14.qcow2"},
		{"convert -O qcow2 -B data.raw -F raw text.raw v15.qcow2", "v15.qcow2"},
		{"convert -n -O qcow2 text.raw v15.qcow2", "v15.qcow2"},
		{"convert -O qcow2 packed.qcow2 v16.qcow2", "v16.qcow2"},
	} {
		t.Run(tt.line, func(t *testing.T) {
			args := splitLine(tt.line)
			compareOutcomes(t, runQemuImg(t, theirs, args...), runHere(t, ours, args...))
			their, our := describeImage(t, theirs, tt.file), describeImage(t, ours, tt.file)
			if our != their {
				t.Errorf("the image is\n%s\nafter qemu-img\n%s", our, their)
			}
			if strings.Contains(their, "nope.qcow2") {
				return
			}
			testenv.Run(t, "qemu-img", "compare", filepath.Join(theirs, tt.file), filepath.Join(ours, tt.file))
			if strings.HasSuffix(tt.file, ".qcow2") {
				testenv.Run(t, "qemu-img", "check", "-q", filepath.Join(ours, tt.file))
			}
		})
	}
}

// describeImage tells what an image is like, in the words of qemu-img info, without the space it takes.
func describeImage(t *testing.T, dir, file string) string {
	t.Helper()
	var kept []string
	for _, line := range strings.Split(runQemuImg(t, dir, "info", file).stdout, "\n") {
		if !strings.HasPrefix(line, "disk size:") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "\n")
}
