package svid

// For tests of what is pure.
var (
	HalfLife  = halfLife
	RetryWait = retryWait
	Timeout   = timeout
)
