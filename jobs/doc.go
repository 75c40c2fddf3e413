// Package jobs is whole-disk work on virtual disks: copying one to another, comparing two, joining several, and
// moving data between the layers of a backing chain (Commit down into it, Rebase up out of it).
//
// A job sees only block.Devices. It asks the source what is where (Device.Extents), so that it never reads
// what is known to be zero; it moves the rest in windows of a few MiB, several at a time, each in a pooled
// buffer; and it stops at the next window when its context is cancelled.
//
//	err := jobs.Convert(ctx, source, target, jobs.ConvertOptions{TargetIsZero: true, Progress: show})
//	verdict, err := jobs.Compare(ctx, source, target, jobs.CompareOptions{})
//
//	source --Extents--> windows --workers: read, look for zeros, write--> target
//
// Memory is Workers × BufferSize whatever the size of the disks. Opening, creating and closing images is the
// caller's work (package image), as is saying which part of a target already reads as zeros.
package jobs
