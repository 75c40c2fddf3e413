package server

import "github.com/platter-disk/platter/nbd"

// terms are what a connection agreed on: all that is needed to judge a request.
type terms struct {
	mode     nbd.ReplyMode
	size     uint64 // of the export, bytes
	blocks   nbd.BlockSizes
	readOnly bool
	contexts []metaContext
}

func (t *terms) extended() bool { return t.mode == nbd.ExtendedReplies }

// check judges the header of a request by the rules of the protocol document. It returns 0 when the request
// may be carried out, or the error to answer with and the rule that was broken.
func (t *terms) check(r *nbd.Request) (nbd.Errno, string) {
	allowed := nbd.CmdFlagFUA // valid for all commands
	changes, payload, ranged := false, false, true
	switch r.Command {
	case nbd.CmdRead:
		if t.mode != nbd.SimpleReplies {
			allowed |= nbd.CmdFlagDF
		}
	case nbd.CmdWrite:
		changes, payload = true, true
		if t.extended() {
			allowed |= nbd.CmdFlagPayloadLen
		}
	case nbd.CmdFlush:
		ranged = false
	case nbd.CmdTrim:
		changes = true
	case nbd.CmdCache:
	case nbd.CmdWriteZeroes:
		changes = true
		allowed |= nbd.CmdFlagNoHole | nbd.CmdFlagFastZero
	case nbd.CmdBlockStatus:
		allowed |= nbd.CmdFlagReqOne
		if t.extended() {
			allowed |= nbd.CmdFlagPayloadLen
		}
	default:
		return nbd.EINVAL, "the command is unknown"
	}
	switch {
	case r.Flags&^allowed != 0:
		return nbd.EINVAL, "a command flag is unknown or not for this command"
	case payload && t.extended() && r.Flags&nbd.CmdFlagPayloadLen == 0:
		return nbd.EINVAL, "a write needs the payload length flag with extended headers"
	case changes && t.readOnly:
		return nbd.EPERM, "the export is read-only"
	case !ranged && (r.Offset != 0 || r.Length != 0):
		return nbd.EINVAL, "offset and length of a flush must be 0"
	case r.Command == nbd.CmdBlockStatus && len(t.contexts) == 0:
		return nbd.EINVAL, "no metadata context was negotiated"
	case r.Command == nbd.CmdBlockStatus && r.Flags&nbd.CmdFlagPayloadLen != 0:
		if r.Length < 8 || r.Length > nbd.MaxBlockStatusRequest {
			return nbd.EINVAL, "the payload is shorter or longer than a block status request can be"
		}
		return 0, "" // Length is the payload's; the range is judged when the payload has been read
	case r.Command == nbd.CmdBlockStatus && r.Length == 0:
		return nbd.EINVAL, "the length of a block status request must not be 0"
	case (r.Command == nbd.CmdRead || r.Command == nbd.CmdWrite || r.Command == nbd.CmdCache) && r.Length > uint64(t.blocks.Maximum):
		return nbd.EINVAL, "the length exceeds the maximum block size"
	case r.Offset > t.size || r.Length > t.size-r.Offset:
		if r.Command == nbd.CmdWrite || r.Command == nbd.CmdWriteZeroes {
			return nbd.ENOSPC, "the request ends past the end of the export"
		}
		return nbd.EINVAL, "the request ends past the end of the export"
	case (r.Offset|r.Length)&uint64(t.blocks.Minimum-1) != 0:
		return nbd.EINVAL, "offset and length must be multiples of the minimum block size"
	}
	return 0, ""
}
