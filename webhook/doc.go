// Package webhook answers the API server's admission reviews: /inject puts the
// sidecar into pods that ask for it by Istio's labels, and /validate refuses
// policies that the engine could not represent, and warns of risky ones.
//
//	server, err := webhook.New(webhook.Config{Listener: l, GetCertificate: cert, Inject: injector, ...})
//	err = server.Run(ctx)
//
// Both answers are pure functions of the review and the configuration: Injector
// and Review do no I/O and read no clock, and nothing is remembered between two
// reviews, so a dry run is no different from any other.
//
// It refuses a pod rather than let it run otherwise than its author asked: an
// annotation that cannot be read, an application container with the proxy's uid, a
// foreign container of the sidecar's name. Values of annotations become typed
// values before anything is made of them and are written by marshalling, never
// into text. What is denied here is denied with its reason; which webhook fails
// open or closed when nobody answers is said in docs/webhooks.md.
//
// It assumes that the API server applied the selectors of the webhook
// configurations: a pod that is asked about is injected although our own view of
// its namespace may lag behind. It does not authenticate its caller, as API
// servers present no certificate by default: whoever reaches the port can have a
// review answered, at a bounded cost, and learns nothing secret from it.
package webhook
