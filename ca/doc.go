// Package ca is the certificate authority: a root, two constrained issuers under
// it, and the one path by which anything is signed.
//
//	check the CSR → template → (lint → ledger intent → sign) → ledger result
//
// The brackets are one [crypto.MessageSigner]: [x509.CreateCertificate] hands it
// the to-be-signed bytes, so what was linted and recorded is what is signed. No
// key of an issuer is reachable but through it.
//
// It refuses: names in a CSR other than the attested identity's, weak keys, a
// ledger that cannot be written, keys on disk that others can read, files that
// are half-written or do not belong together, a clock before its certificates,
// and a plugged-in chain without name constraints unless told otherwise. It
// assumes that its caller has attested the identity it asks for, and that nobody
// else writes to its directory (a lock keeps a second server out).
package ca
