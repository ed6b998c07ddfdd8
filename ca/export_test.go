package ca

import "context"

// Renew is one look of Run's.
func Renew(ctx context.Context, a *Authority) error { return a.renew(ctx) }
