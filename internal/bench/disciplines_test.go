package bench

import (
	"bytes"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/platter-disk/platter/format/qcow2"
	"github.com/platter-disk/platter/internal/testenv"
	"github.com/platter-disk/platter/storage"
)

func disciplineBench(t *testing.T, cases ...string) *DisciplineBench {
	return &DisciplineBench{
		Dir: t.TempDir(), Cases: cases, Operations: 4, Notes: io.Discard,
		below: func(f storage.File) storage.File { return withoutSync{f} },
	}
}

// TestDisciplines compares what is counted with what each discipline promises.
func TestDisciplines(t *testing.T) {
	results, err := disciplineBench(t).Run(t.Context(), Disciplines())
	if err != nil {
		t.Fatal(err)
	}
	if want := len(DisciplineCases()) * len(qcow2.Disciplines()); len(results) != want {
		t.Fatalf("%d results, want %d", len(results), want)
	}
	for _, r := range results {
		copies := strings.HasPrefix(r.Case, "overlay") || r.Case == "snapshot-1" || r.Case == "snapshot-64"
		requests := 1.0
		if strings.HasSuffix(r.Case, "-64") {
			requests = 64
		}
		least, most := 0.0, 0.0
		if copies { // with the guest's bytes where they lie in the middle: one write copies up what is around them
			least, most = requests*(caseCluster-caseBlock), requests*caseCluster
		}
		if r.Copied < least || r.Copied > most {
			t.Errorf("%s, %s: %.0f bytes copied, want %.0f to %.0f", r.Case, r.Discipline, r.Copied, least, most)
		}
		if r.Metadata <= 0 || r.Writes < requests && r.Case != "snapshot-create" {
			t.Errorf("%s, %s: %.0f bytes of metadata, %.2f writes", r.Case, r.Discipline, r.Metadata, r.Writes)
		}
		syncs := 1.0
		if copies || r.Case == "sequential-overlay" {
			syncs = 2
		}
		if r.Discipline != qcow2.Synchronous && r.Case != "snapshot-create" && r.Case != "turns-64" && r.Case != "alloc-64" && r.Syncs > syncs {
			t.Errorf("%s, %s: %.2f fdatasyncs, want %.0f", r.Case, r.Discipline, r.Syncs, syncs)
		}
		if r.Discipline == qcow2.Synchronous && r.Case == "alloc-1" && r.Syncs < 2 {
			t.Errorf("%s, %s: %.2f fdatasyncs, fewer than the order of writes needs", r.Case, r.Discipline, r.Syncs)
		}
	}
	var b bytes.Buffer
	if err := (&DisciplineReport{Operations: results}).WriteMarkdown(&b); err != nil {
		t.Fatal(err)
	}
	if want := "| operation | synchronous | ordered | lazy | journal |\n|---|---|---|---|---|\n| allocating write, flush | 2.00 | 1.00 | 1.00 | 1.00 |\n"; !strings.Contains(b.String(), want) {
		t.Errorf("no %q in the report\n%s", want, &b)
	}
}

// TestRecovery crashes images and opens them again.
func TestRecovery(t *testing.T) {
	b := disciplineBench(t)
	b.Operations = 100
	var journal []RecoveryResult
	for _, size := range []int64{16 << 20, 8 << 30} {
		results, err := b.Recover(t.Context(), size, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range results {
			if leaks := r.Discipline == qcow2.Ordered; leaks != (r.Leaked > 0) {
				t.Errorf("%s: %d clusters leaked", r.Discipline, r.Leaked)
			}
			if r.Discipline == qcow2.Journal {
				journal = append(journal, r)
			}
			if r.Reads == 0 || r.BytesRead == 0 {
				t.Errorf("%s: an open without a read: %+v", r.Discipline, r)
			}
		}
	}
	small, large := journal[0], journal[1]
	if large.BytesRead > small.BytesRead+64<<10 || large.BytesWritten > small.BytesWritten+4096 || large.Syncs != small.Syncs {
		t.Errorf("recovery with the journal depends on the size of the image: %+v, %+v", small, large)
	}
	var out bytes.Buffer
	if err := (&DisciplineReport{Recovery: journal}).Write(&out); err != nil || !strings.Contains(out.String(), "8 GiB") {
		t.Errorf("report: %v\n%s", err, &out)
	}
}

// TestQemuDisciplines measures what is known of qemu-nbd: two barriers where counts come before tables, and
// three for each copy-on-write of what a snapshot shares.
func TestQemuDisciplines(t *testing.T) {
	testenv.Need(t, "qemu-nbd", "qemu-img", "strace")
	b := disciplineBench(t, "alloc-1", "snapshot-64", "snapshot-create")
	b.Operations = 2
	results, err := b.Run(t.Context(), QemuDisciplines()[:1])
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct{ least, most float64 }{{2, 2}, {150, 200}, {3, 20}} {
		if r := results[i]; r.Syncs < want.least || r.Syncs > want.most || r.Metadata == 0 {
			t.Errorf("%s: %.2f fdatasyncs and %.0f bytes of metadata, want %v to %v", r.Case, r.Syncs, r.Metadata, want.least, want.most)
		}
	}
	recovered, err := b.Recover(t.Context(), 16<<20, true)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(recovered, func(r RecoveryResult) bool { return r.By == QemuCheck })
	if i < 0 || recovered[i].BytesRead == 0 || recovered[i].BytesWritten == 0 || recovered[i].Leaked != 0 {
		t.Errorf("recovery by qemu-img: %+v", recovered)
	}
}

func TestUnknownCase(t *testing.T) {
	if _, err := disciplineBench(t, "nonsense").Run(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("error %v", err)
	}
}

// TestParseTally tells guest data from metadata, also in calls that another thread interrupts.
func TestParseTally(t *testing.T) {
	log := `10 pread64(7, "\0\0\0\0"..., 4096, 65536) = 4096
10 pwrite64(7, "` + sign + `"..., 4096, 65536 <unfinished ...>
11 pwritev(7, [{iov_base="\0\0\0\0"..., iov_len=4096}, {iov_base="` + sign + `"..., iov_len=4096}], 2, 0) = 8192
11 pwrite64(7, "\0\0\0\0"..., 512, 0 <unfinished ...>
10 <... pwrite64 resumed>) = 4096
11 <... pwrite64 resumed>) = 512
10 preadv(7, [{iov_base="\0"..., iov_len=512}], 1, 0) = -1 EIO (Input/output error)
10 fdatasync(7) = 0
10 ftruncate(7, 1048576) = 0
`
	got, err := parseTally(strings.NewReader(log))
	want := tally{Syncs: 1, Writes: 3, Metadata: 512, Data: 4096 + 8192, Reads: 2, BytesRead: 4096, OtherChanges: 1}
	if err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}

func TestLedger(t *testing.T) {
	l := &ledger{}
	f := l.wrap(storage.NewMemory("file"))
	data := make([]byte, 4096)
	signed(data[1024:2048]) // zeros around it, as copied up
	for _, p := range [][]byte{data, make([]byte, 512), []byte(sign[:8])} {
		if _, err := f.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.ReadAt(data[:100], 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	want := tally{Syncs: 1, Writes: 3, Metadata: 512 + 8, Data: 4096, Reads: 1, BytesRead: 100}
	if got := l.tally(); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
