// Package control is what the tests and the application in their pods say to each
// other on the application's control port, over plain HTTP.
package control

import "time"

// Ports of the application. Control is left out of the mesh by annotation; all others
// are the workload's own.
const (
	Control  = 7070
	HTTP     = 8080 // HTTP/1.1 and WebSocket, declared http
	GRPC     = 9090 // gRPC in the clear, declared grpc
	TCP      = 9000 // echoes, declared tcp
	Greeting = 9001 // speaks first, declared tcp
	Any      = 9002 // HTTP/1.1, h2c and gRPC, undeclared
	Excluded = 9003 // HTTP/1.1, for tests that exclude it from the mesh
	SPIFFE   = 9443 // HTTPS by a go-spiffe program, where the pod has a socket
)

// Greeted is what port Greeting says first.
const Greeted = "220 ready\r\n"

// Call is one request for the application to make.
type Call struct {
	// Kind is "http", "h2c", "grpc", "websocket", "tcp", "greeting", "spiffe",
	// "nobody", which is TLS without a certificate of one's own and with trust in any,
	// or "stream", which is one TCP connection for all calls of a load.
	Kind string `json:"kind"`
	// URL of http, h2c and websocket; HOST:PORT of the others.
	URL    string            `json:"url"`
	Method string            `json:"method,omitempty"`
	Header map[string]string `json:"header,omitempty"`
	Body   string            `json:"body,omitempty"`
	// Fresh asks for a connection of its own.
	Fresh bool `json:"fresh,omitempty"`
	// Expect is the SPIFFE ID that a spiffe call wants of its peer.
	Expect string `json:"expect,omitempty"`
	// Timeout of all of it, in milliseconds; default 10 s, and 30 s in a load, which is
	// about failures and not about a machine that is slow for a moment.
	Timeout int `json:"timeout,omitempty"`
}

// Result is how a call went.
type Result struct {
	// Error is why there is no answer; Status and Body are the answer's.
	Error  string `json:"error,omitempty"`
	Status int    `json:"status,omitempty"`
	// Code is the gRPC status' name.
	Code string `json:"code,omitempty"`
	Body string `json:"body,omitempty"`
	// Header is the first value of each of the answer's.
	Header map[string]string `json:"header,omitempty"`
	// Seen is what the other application got, where it says so.
	Seen *Seen `json:"seen,omitempty"`
	// Millis is how long it took.
	Millis float64 `json:"millis"`
}

// Seen is what an application got, as it answers itself.
type Seen struct {
	Pod    string              `json:"pod"`
	Header map[string][]string `json:"header,omitempty"`
	// Peer is the SPIFFE ID of the caller where the application itself does TLS.
	Peer string `json:"peer,omitempty"`
}

// Load is a stream of calls.
type Load struct {
	Call Call `json:"call"`
	// Every is the time between two calls.
	Every time.Duration `json:"every"`
}

// Report is how a load went so far.
type Report struct {
	Calls  int `json:"calls"`
	Failed int `json:"failed"`
	// Failures are the first few, with their time.
	Failures []string `json:"failures,omitempty"`
	// Longest call in milliseconds.
	Longest float64 `json:"longest"`
}

// Identity is what a go-spiffe program in the pod was given.
type Identity struct {
	ID       string    `json:"id"`
	Serial   string    `json:"serial"`
	NotAfter time.Time `json:"notAfter"`
	// Updates counts renewals since the first.
	Updates int `json:"updates"`
	// Served is the time from the program's start to the first SVID.
	Served time.Duration `json:"served"`
}

// Started says when the application began.
type Started struct {
	Started time.Time `json:"started"`
}
