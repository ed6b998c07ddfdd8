package csi

// MaxVolumes is the bound of a node.
const MaxVolumes = maxVolumes

// MaxOfPod is the bound of a pod.
const MaxOfPod = maxOfPod

// SweepOnce looks for volumes whose directory is gone.
func (d *Driver) SweepOnce() { d.sweepOnce() }
