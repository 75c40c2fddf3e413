// Package nbd is the Network Block Device protocol: the messages on the wire, and a client that presents a
// remote export as a [storage.File].
//
//	disk, err := nbd.Dial("nbd://host/export", nbd.ClientOptions{Connections: 4})
//	_, err = disk.WriteAt(p, off) // from any number of goroutines
//	err = disk.Sync()             // now all of it is durable
//
// Package image opens images that are in an export by its URI. Package server serves. The rest of this package is what
// the two of them are made of.
//
// # The conversation
//
// A connection has two phases. In the handshake the client names an export and the two sides agree on
// features, one option at a time; in the transmission phase the client sends requests, each tagged with a
// cookie, and the server answers them in any order.
//
//	server                                          client
//	  greeting: NBDMAGIC IHAVEOPT flags  ------->
//	                                     <-------   client flags
//	                                     <-------   option header, data   (STARTTLS, STRUCTURED_REPLY,
//	  option reply, …, final reply       ------->                          SET_META_CONTEXT, LIST, INFO, …)
//	                                     <-------   GO
//	  info replies, ACK                  ------->
//	--------------------------------- transmission ---------------------------------
//	                                     <-------   request header [payload]
//	  reply header [payload]             ------->
//
// Three forms of reply exist; which one is used was agreed in the handshake:
//
//	simple      magic error cookie [data]                        nothing agreed
//	structured  magic flags type cookie length [payload]         STRUCTURED_REPLY
//	extended    magic flags type cookie offset length [payload]  EXTENDED_HEADERS (64-bit lengths)
//
// # The files
//
// protocol.go, errno.go, handshake.go, option.go, request.go, reply.go and blockstatus.go are the wire: plain
// types with encode and decode, no I/O and no state. Encoders append to a byte slice; decoders never keep
// the slice they are given, allocate nothing that its length does not cover, and return errors that wrap
// [ErrProtocol]. uri.go reads and writes NBD URIs. client*.go is the client. Package server, below this one,
// is the other end.
//
// The rules quoted in comments are those of the NBD protocol document (doc/proto.md of the NBD project) and
// of the NBD URI document (doc/uri.md there).
package nbd
