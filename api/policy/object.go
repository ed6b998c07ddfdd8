package policy

// Object is a policy as an API server has it.
type Object struct {
	Kind, Namespace, Name string
	// UID tells it from another one that had its name before.
	UID string
	// Generation rises with every change of its spec.
	Generation int64
	// JSON is the whole object but for what no policy depends on. It must not be changed.
	JSON []byte
}
