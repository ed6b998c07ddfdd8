// Package install puts Castellan into a cluster, changes it in place, takes it out
// again, and says whether a cluster is fit for it and it is well there. What it
// applies is the Helm chart that the command carries, rendered by Helm's own engine:
// what helm install applies is the same.
//
// It refuses values that the chart's schema does not know, and to take over objects
// that somebody else's installation made. It never overwrites what the server
// writes: the authority's Secret, the webhooks' trust. It removes the webhooks
// before what answers them, so that no step of an uninstallation, and no crash
// between two, leaves a cluster that cannot start pods.
//
// It assumes a caller who may do all this: the permissions are those of whoever
// runs the command.
package install
