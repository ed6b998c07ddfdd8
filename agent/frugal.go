package agent

import (
	"errors"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Two bytes of a message can make a hundred of memory, so that the size on the
// wire bounds little: its parts are counted before it is decoded. Envoy's list
// of its extensions has some 3,000, a proxy's list of what it holds 3 for each.
const (
	maxParts = 16 << 10
	maxDepth = 100
)

var errTooManyParts = errors.New("message has more parts than any client sends")

// frugal is a codec that refuses to decode what would be far larger than it was
// on the wire.
type frugal struct{ encoding.CodecV2 }

// Marshal implements encoding.CodecV2. gRPC's own takes a buffer of 1 MiB for what
// is larger than 32 KiB, and holds it until the client has read.
func (f frugal) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return f.CodecV2.Marshal(v)
	}
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (f frugal) Unmarshal(data mem.BufferSlice, v any) error {
	buf := data.MaterializeToBuffer(mem.NopBufferPool{})
	defer buf.Free()
	if m, ok := v.(proto.Message); ok {
		budget := maxParts
		if !frugalParts(buf.ReadOnlyData(), m.ProtoReflect().Descriptor(), maxDepth, &budget) {
			return errTooManyParts
		}
	}
	return f.CodecV2.Unmarshal(mem.BufferSlice{buf}, v)
}

// frugalParts takes the fields of a message and of those inside it from budget,
// and reports whether it was enough. What is malformed is left to the decoder;
// what is unknown stays bytes there, and costs what it costs on the wire.
func frugalParts(b []byte, d protoreflect.MessageDescriptor, depth int, budget *int) bool {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return true
		}
		b = b[n:]
		if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
			return true
		}
		value := b[:n]
		b = b[n:]
		if *budget--; *budget < 0 {
			return false
		}
		field := d.Fields().ByNumber(number)
		if field == nil || kind != protowire.BytesType {
			continue
		}
		inner, _ := protowire.ConsumeBytes(value)
		switch {
		case field.Message() != nil:
			if depth == 0 || !frugalParts(inner, field.Message(), depth-1, budget) {
				return false
			}
		case field.IsList() && field.Kind() != protoreflect.StringKind && field.Kind() != protoreflect.BytesKind:
			if *budget -= len(inner); *budget < 0 { // packed numbers, a byte each at least
				return false
			}
		}
	}
	return true
}
