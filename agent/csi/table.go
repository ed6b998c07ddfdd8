package csi

import (
	"errors"
	"fmt"
)

var (
	errFull      = fmt.Errorf("this node serves %d volumes already, which is the most", maxVolumes)
	errPodFull   = fmt.Errorf("the pod has %d volumes of the driver already, which is the most", maxOfPod)
	errElsewhere = errors.New("the volume is published at another path")
	errOccupied  = errors.New("another volume is published at that path")
)

// enter takes the turn of a volume at a path, in the table from now on. A volume is
// at one path, and a path is one volume's. podUID is that of the path. Call leave.
func (d *Driver) enter(id, path, podUID string) (*entry, error) {
	for {
		e, err := d.find(id, path, podUID)
		if err != nil {
			return nil, err
		}
		e.turn.Lock()
		if !e.gone {
			return e, nil
		}
		e.turn.Unlock() // it left while we waited
	}
}

func (d *Driver) find(id, path, podUID string) (*entry, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if other, taken := d.targets[path]; taken && other != id {
		return nil, errOccupied
	}
	e, ok := d.volumes[id]
	switch {
	case ok && d.targets[path] != id:
		return nil, errElsewhere
	case ok:
		return e, nil
	case len(d.volumes) >= maxVolumes:
		return nil, errFull
	case d.ofPod(podUID) >= maxOfPod:
		return nil, errPodFull
	}
	e = &entry{id: id, path: path, podUID: podUID}
	d.volumes[id], d.targets[path] = e, id
	return e, nil
}

// ofPod counts a pod's volumes. The caller holds d.mu.
func (d *Driver) ofPod(uid string) (n int) {
	for _, e := range d.volumes {
		if e.podUID == uid {
			n++
		}
	}
	return n
}

// leave ends the turn. A volume that is not served leaves the table.
func (d *Driver) leave(e *entry) {
	d.mu.Lock()
	if e.endpoint == nil && !e.gone {
		e.gone = true
		delete(d.volumes, e.id)
		delete(d.targets, e.path)
	}
	d.mu.Unlock()
	e.turn.Unlock()
}

// end ends what is served of a volume and forgets its token. Its turn is taken.
func (d *Driver) end(e *entry) {
	e.endpoint.Close()
	e.endpoint = nil
	if err := d.store.drop(e.id); err != nil {
		d.cfg.Log.Warn("record of a volume stays", "volume", e.id, "error", err)
	}
}
