// Package ledger records every certificate before it is signed.
//
// An intent is on disk before [Ledger.Intent] returns; the signer signs only
// after that, so no certificate exists that the ledger does not know. What became
// of it follows as a result, written with a later commit and not waited for: an
// intent without a result is to be taken as issued. Rows are only ever added,
// never changed.
//
// It refuses to go on when a row cannot be made durable (disk full, closed,
// damaged): [ErrUnavailable], and then nothing is signed. It assumes one process
// per file and holds a lock to make sure.
package ledger

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrUnavailable says that the ledger cannot be written; nothing may be signed.
var ErrUnavailable = errors.New("ledger: cannot be written")

// ErrNotFound says that no row has the serial that was asked for.
var ErrNotFound = errors.New("ledger: no such row")

// AttestorAuthority stands in rows of the authority's own certificates: root,
// issuers and serving certificates, which nobody attested.
const AttestorAuthority = "authority"

// Outcome is what became of an intent.
type Outcome uint8

// Outcomes. Pending rows must be treated as issued: the process may have ended
// between the signature and the result.
const (
	Pending Outcome = iota
	Issued
	Failed
)

// String returns "intent", "issued" or "failed".
func (o Outcome) String() string {
	switch o {
	case Pending:
		return "intent"
	case Issued:
		return "issued"
	case Failed:
		return "failed"
	}
	return "unknown"
}

// Entry is one row.
type Entry struct {
	// Sequence is given by the ledger: positive, rising.
	Sequence uint64
	// Serial is the certificate's number in lower-case hex without leading zeros.
	Serial string
	// SPIFFEID is the certified identity; zero for serving certificates.
	SPIFFEID spiffeid.ID
	PodUID   string
	Node     string
	Cluster  string
	// Attestor says who vouched for the identity, AttestorAuthority for the authority's own.
	Attestor string
	// SubjectKeyID and IssuerKeyID are the extensions' values.
	SubjectKeyID []byte
	IssuerKeyID  []byte
	// TBSHash is the SHA-256 of the to-be-signed bytes, as linted and signed.
	TBSHash [32]byte
	// LeafHash is the SHA-256 of the signed certificate; zero until issued.
	LeafHash [32]byte
	// RecordedAt is when the intent was made.
	RecordedAt time.Time
	NotBefore  time.Time
	NotAfter   time.Time
	Outcome    Outcome
}

// Result is what became of an intent.
type Result struct {
	Outcome  Outcome
	LeafHash [32]byte
}

// Filter selects rows; zero fields select all. Fields are joined by "and".
type Filter struct {
	Serial       string
	SPIFFEID     spiffeid.ID
	PodUID       string
	Node         string
	Attestor     string
	SubjectKeyID []byte
	IssuerKeyID  []byte
	// Since and Until bound RecordedAt: [Since, Until).
	Since, Until time.Time
	// After returns only rows of a greater sequence.
	After uint64
	// Limit bounds the number of rows; zero is no bound.
	Limit int
}

// Recorder is what a signer needs.
type Recorder interface {
	// Intent makes e durable and returns its sequence. A result for that
	// sequence must follow. On any error nothing may be signed; the error is
	// ErrUnavailable or the context's.
	Intent(ctx context.Context, e Entry) (uint64, error)
	// Result adds what became of an intent. It does not wait for the disk.
	Result(sequence uint64, r Result)
}

// Reader answers questions about what was issued.
type Reader interface {
	// Query yields the selected rows, oldest first.
	Query(ctx context.Context, f Filter) iter.Seq2[Entry, error]
	// BySerial returns the row of a serial number, or ErrNotFound.
	BySerial(ctx context.Context, serial string) (Entry, error)
	// Rows returns how many intents the ledger holds.
	Rows(ctx context.Context) (uint64, error)
}

// Ledger is both, and the right to end it.
type Ledger interface {
	Recorder
	Reader
	// Healthy returns why the last write failed, nil if it did not.
	Healthy() error
	// Close writes what is waiting and releases the file.
	Close() error
}
