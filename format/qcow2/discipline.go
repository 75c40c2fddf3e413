package qcow2

import (
	"fmt"
	"strings"
)

// A change of an image's metadata is an update, and every discipline keeps the same law about it:
//
//  1. data before the word that exposes it, if losing that order would show anything but the old or the new
//     bytes;
//  2. a reference count before the word that uses it;
//  3. released space is handed out again only when the update that released it is durable;
//  4. a leak is acceptable where a discipline says so, a lost or foreign byte never.
//
// The words of an update change in memory at once, for everybody. When they reach the file is what a
// discipline decides.
type update struct {
	slice   *tableSlice // where the words are: a pinned slice of an L2 table, or nil for the L1 table
	first   int64       // index of the first word, in the slice or in the L1 table
	words   []uint64
	exposes generation // when the newest bytes this makes reachable were written; 0: none that owe a barrier

	uses     []freeRun // what the words refer to from now on
	releases []hostRun // what the image no longer reaches afterwards
	unlinked bool      // nothing reaches that any more, as of a change of the header that was made before
}

// tableWord is a word of the refcount table and where it lies.
type tableWord struct {
	at   hostOff
	word uint64
}

// discipline decides when and how updates reach the disk. Its methods are safe for concurrent use.
type discipline interface {
	// accept takes an update; its words and counts change in memory. The caller holds Image.mu.
	accept(u *update) error

	// full reports that requests have to wait for a flush before another update is accepted. The caller holds
	// Image.mu.
	full() bool

	// settle runs after an operation's updates were accepted, with no lock held but its guest range.
	settle() error

	// writeback writes accepted updates to the file, in safe order, so that cached tables can be evicted. It
	// promises nothing about what is durable afterwards. No lock but guest ranges may be held.
	writeback() error

	// publishBlocks has the refcount table point to refcount blocks that were just written. The caller holds
	// Image.mu.
	publishBlocks(words []tableWord) error

	// settleCounts runs before changeHeader if counts were raised for what the header is going to point to.
	settleCounts() error

	// changeHeader brings fields of the header in memory to the file, after everything that they point to,
	// and gives up what they pointed to before. It is durable after the next flush at the latest. The caller
	// holds Image.mu.
	changeHeader(f headerField, releases []hostRun) error

	// progress notes how far a long operation has come. It is durable together with whatever else is accepted
	// in the same hold of Image.mu, under disciplines that finish such operations after a crash; the others
	// leave leaks. The caller holds Image.mu.
	progress(o operation)

	// replaceHeader has edit change the header in memory in what changeHeader has no field for, extensions and the
	// backing file, and brings the whole of it to the file. A crash leaves the old header or the new one; an error
	// leaves the old one, unless the image failed. The caller holds Image.resizing and the whole guest range, and
	// not Image.mu.
	replaceHeader(edit func(*Header)) error

	// quiesced runs fn, which holds Image.mu, while nothing of the metadata is on its way: what was accepted is durable
	// and in its place, and no flush or checkpoint is under way. The caller holds Image.resizing and the whole guest
	// range, and not Image.mu.
	quiesced(fn func() error) error

	// flush makes everything that was accepted before the call durable.
	flush() error

	// close makes everything durable and leaves the image as the format wants it between sessions. Nothing
	// of the discipline runs afterwards, even if it fails.
	close() error
}

// Disciplines that Options.Discipline names.
const (
	Synchronous = "synchronous" // every change of metadata is durable before the operation returns
	Ordered     = "ordered"     // write-back tables with counts reserved ahead; nothing but leaks after a crash
	Journal     = "journal"     // changes go to a journal and to their places later; nothing leaks
	Lazy        = "lazy"        // counts are written at close; after a crash they are rebuilt
)

// Disciplines lists the names that Options.Discipline takes.
func Disciplines() []string { return []string{Synchronous, Ordered, Lazy, Journal} }

// newDiscipline returns the discipline of a name. "" is what the image asks for: Journal if it
// has the journal extension, Lazy if its lazy refcounts bit is set, else Ordered.
func newDiscipline(name string, im *Image) (discipline, error) {
	if name == "" {
		switch {
		case im.header.Journal != nil:
			name = Journal
		case im.header.Compatible&CompatLazyRefcounts != 0:
			name = Lazy
		default:
			name = Ordered
		}
	}
	switch name {
	case Synchronous:
		return newSynchronous(im), nil
	case Ordered:
		return newOrdered(im), nil
	case Lazy:
		return newLazy(im)
	case Journal:
		return newJournal(im)
	}
	return nil, fmt.Errorf("%s: discipline %q: want one of %s", im.file.Name(), name, strings.Join(Disciplines(), ", "))
}
