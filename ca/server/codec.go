package server

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
)

// maxRequest bounds what is decoded of callers who have not proved themselves: a
// certificate request of maxCSR with its metadata is far below. A message of empty
// elements becomes many times its size.
const maxRequest = 64 << 10

// request is decoded only if it is no larger than maxRequest. gRPC's own bound
// (maxMessage) does not do: its answer is one that clients retry.
type request struct {
	into any
	// size is set when it was too large.
	size int
}

// codec decodes requests, and all else as gRPC does.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*request)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	if n := data.Len(); n > maxRequest {
		r.size = n
		return nil
	}
	return c.CodecV2.Unmarshal(data, r.into)
}
