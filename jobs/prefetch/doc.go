// Package prefetch lets a disk start at once from a base image that is far away, while the disk moves over: what a
// guest reads is kept (copy-on-read), and what it has not read yet is fetched in the background (prefetching), at a
// pace that gives way to everyone else's work. When nothing is left in the base image, the disk lets go of it.
//
//	guest                      background
//	  |                             |
//	CopyOnRead ----- Profile ---> Prefetcher      pauses, rates, order
//	  |                             |
//	  +----------> Overlay <--------+             what lives in the base, read the base, keep a copy
//	                  |
//	        fvd.Image, or Guarded over any block.Device with a backing image
//
//	disk := prefetch.NewCopyOnRead(over, prefetch.CopyOnReadOptions{}) // what the guest is given
//	p := prefetch.New(over, prefetch.Options{Guest: disk.Guest(), Announce: disk.Announce})
//	err := p.Run(ctx) // until the base image is not needed any more
//
// What is on its way from the base image is not asked for twice: a read joins the fetch that is under way. A base image
// that fails is tried again; a disk that fails ends the copying, never the guest's requests.
//
// Copies are soft: the guest has no claim on them, a crash may lose them, and the base image still holds the same
// bytes. FVD keeps copies without making each durable; other formats store them like any write.
//
// The control algorithm is that of the FVD proposal (FVD specification 2.3 and 2.4): throughput of reads and writes
// is averaged, and when an average falls below its minimum a fair coin decides whether to pause, so that many hosts
// that share a congested server do not all pause together. Maximum rates are enforced as well. A Profile, recorded
// while a machine starts, puts what starting needs first.
package prefetch
