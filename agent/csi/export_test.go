package csi

// MaxVolumes is the bound of a node.
const MaxVolumes = maxVolumes

// SweepOnce looks for volumes whose directory is gone.
func (d *Driver) SweepOnce() { d.sweepOnce() }
