package webhook

const (
	// maxBody bounds one review: it holds an object twice at an update, and the API
	// server takes 3 MiB at most.
	maxBody = 7 << 20
	// minCharge is what a review counts at least, for what is not its body.
	minCharge = 16 << 10
	// maxHeld bounds the bodies of all reviews at once. An ordinary one has some ten
	// kilobytes.
	maxHeld = 48 << 20
	// maxHeldBySource leaves room for the API server whatever somebody else sends.
	maxHeldBySource = maxHeld / 2
	// maxWorked reviews are decoded and judged at once, which takes each of them a
	// millisecond at most.
	maxWorked = 4
	// maxWorkedBySource leaves places whatever somebody else sends.
	maxWorkedBySource = maxWorked / 2
	// maxPodElements and maxPolicyElements bound the items of lists and members of
	// objects in a review: of two bytes each, some would become kilobytes.
	maxPodElements    = 20_000
	maxPolicyElements = 200_000
)

// budget bounds what reviews under way may hold, as anybody who reaches the port
// can send some.
type budget struct {
	room
	// worked is for what is computed at once: a body becomes many times its size.
	worked *turns
}

func newBudget() *budget {
	return &budget{room: room{sources: map[string]int64{}}, worked: newTurns()}
}

// elements counts the items and members of a JSON text, at least.
func elements(data []byte) int {
	n, inString, escaped := 1, false, false
	for _, c := range data {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped = c == '\\'
			inString = c != '"'
		case c == '"':
			inString = true
		case c == ',' || c == '{' || c == '[':
			n++
		}
	}
	return n
}
