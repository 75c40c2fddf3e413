package crashlab

import "github.com/platter-disk/platter/storage"

// sector is the contents of one sector. Sectors reachable from a tree are immutable.
type sector = [storage.SectorSize]byte

// sectorTree maps sector numbers to contents. It is persistent: snapshot is O(1), and a later set copies only
// the path it changes. A sector without an entry was never written. The zero value is an empty tree.
//
// One goroutine may change a tree; any number may read it meanwhile only through snapshots of their own.
type sectorTree struct {
	root   *treeNode
	height uint // levels of inner nodes above the leaves
	owner  *treeOwner
}

// treeOwner marks the nodes that a tree made for itself since its last snapshot and may change in place.
type treeOwner struct{ _ byte }

const (
	fanBits = 6
	fan     = 1 << fanBits
)

// treeNode is an inner node (kids) or a leaf (secs).
type treeNode struct {
	owner *treeOwner
	kids  *[fan]*treeNode
	secs  *[fan]*sector
}

// innerNode and leafNode hold a node and its array in one allocation.
type innerNode struct {
	treeNode
	array [fan]*treeNode
}

type leafNode struct {
	treeNode
	array [fan]*sector
}

func newNode(owner *treeOwner, leaf bool) *treeNode {
	if leaf {
		n := &leafNode{treeNode: treeNode{owner: owner}}
		n.secs = &n.array
		return &n.treeNode
	}
	n := &innerNode{treeNode: treeNode{owner: owner}}
	n.kids = &n.array
	return &n.treeNode
}

// snapshot returns a tree with the same contents that is independent of t from now on.
func (t *sectorTree) snapshot() sectorTree {
	t.owner = nil
	return t.fork()
}

// fork is snapshot for a tree that nobody changes any more; any number of goroutines may fork it.
func (t *sectorTree) fork() sectorTree { return sectorTree{root: t.root, height: t.height} }

// capacity is the number of sectors that the present height can address. It does not overflow: files end at
// maxFileSize, for which a height of 8 is enough.
func (t *sectorTree) capacity() int64 { return 1 << (fanBits * (t.height + 1)) }

// get returns the contents of sector i, nil where it was never written.
func (t *sectorTree) get(i int64) *sector {
	if t.root == nil || i >= t.capacity() {
		return nil
	}
	n := t.root
	for level := t.height; level > 0; level-- {
		if n = n.kids[i>>(fanBits*level)&(fan-1)]; n == nil {
			return nil
		}
	}
	return n.secs[i&(fan-1)]
}

// set replaces the contents of sector i; nil makes it never written.
func (t *sectorTree) set(i int64, s *sector) {
	if t.owner == nil {
		t.owner = new(treeOwner)
	}
	for {
		if t.root == nil {
			t.root = newNode(t.owner, t.height == 0)
		}
		if i < t.capacity() {
			break
		}
		up := newNode(t.owner, false)
		up.kids[0] = t.root
		t.root, t.height = up, t.height+1
	}
	at := &t.root
	for level := t.height; ; level-- {
		n := t.own(at, level == 0)
		if level == 0 {
			n.secs[i&(fan-1)] = s
			return
		}
		at = &n.kids[i>>(fanBits*level)&(fan-1)]
	}
}

// own makes *at a node that t may change.
func (t *sectorTree) own(at **treeNode, leaf bool) *treeNode {
	old := *at
	if old != nil && old.owner == t.owner {
		return old
	}
	n := newNode(t.owner, leaf)
	if old != nil && leaf {
		*n.secs = *old.secs
	} else if old != nil {
		*n.kids = *old.kids
	}
	*at = n
	return n
}

// next returns the first sector at or after i that has an entry; contents nil when there is none.
func (t *sectorTree) next(i int64) (int64, *sector) {
	if t.root == nil || i >= t.capacity() {
		return 0, nil
	}
	return t.root.next(i, 0, t.height)
}

// next searches the subtree n, whose first sector is base, for the first entry at or after from.
func (n *treeNode) next(from, base int64, level uint) (int64, *sector) {
	shift := fanBits * level
	k := int64(0)
	if from > base {
		k = (from - base) >> shift
	}
	for ; k < fan; k++ {
		first := base + k<<shift
		if level == 0 {
			if n.secs[k] != nil {
				return first, n.secs[k]
			}
		} else if n.kids[k] != nil {
			if i, s := n.kids[k].next(from, first, level-1); s != nil {
				return i, s
			}
		}
	}
	return 0, nil
}
