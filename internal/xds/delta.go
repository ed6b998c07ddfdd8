package xds

// ServeDelta serves one delta stream until it ends. The error is one that gRPC
// can give to the peer.
func ServeDelta(stream DeltaStream, cfg Config) error { return nil }
