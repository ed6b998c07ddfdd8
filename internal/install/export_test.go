package install

// Known reports whether objects of a kind can be applied.
func Known(kind string) bool { _, ok := kinds[kind]; return ok }
