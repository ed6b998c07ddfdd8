package caclient

import (
	"crypto"
	"time"

	"castellan.dev/identity"
)

// CheckJWT is what MintJWT does with an answer.
var CheckJWT = checkJWT

// CheckChain is what Issue does with an answer.
func CheckChain(elements []string, w identity.Workload, key crypto.PublicKey, now time.Time) (*Answer, error) {
	return checkChain(elements, expectation{workload: w, key: key, now: now})
}
