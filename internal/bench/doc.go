// Package bench measures what a virtual disk costs: CPU, heap allocations, write calls, bytes and
// fdatasyncs an operation, for a fixed set of workloads.
//
//	Workload + Survey -> plan (which offsets)          what is allocated decides where a workload goes
//	plan + Disk       -> run (N requests in flight)
//	Meter             -> Result                        read before and after the run
//
// A [Disk] is an engine in this process ([OpenImage]) or an export of an NBD server ([DialDisk]). A [Meter]
// is what the run is charged to: this process with a counter under the engine, or another process by what
// Linux tells about it in /proc and what strace sees.
//
// [Versus] runs two servers in turn, A B A B, with the same client on equal images, so that their numbers
// can be divided by one another. Times depend on the machine and on what else it does; of those only ratios
// from one run mean anything. Counts do not.
package bench
