package config

// Webhook configures the admission webhooks: sidecar injection and validation of policy.
type Webhook struct {
	// Listen is the host:port of /inject and /validate; default ":15017".
	Listen string `json:"listen,omitempty"`
}

func (w *Webhook) setDefaults() { setDefault(&w.Listen, ":15017") }
