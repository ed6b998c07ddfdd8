package attest

// Remembered counts the remembered reviews.
func Remembered(a *Attestor) int {
	a.reviews.mu.Lock()
	defer a.reviews.mu.Unlock()
	return len(a.reviews.known)
}
