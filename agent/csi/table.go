package csi

import (
	"errors"
	"fmt"
)

var (
	errFull      = fmt.Errorf("this node serves %d volumes already, which is the most", maxVolumes)
	errElsewhere = errors.New("the volume is published at another path")
	errOccupied  = errors.New("another volume is published at that path")
)

// enter takes the turn of a volume at a path, in the table from now on. A volume is
// at one path, and a path is one volume's. Call leave.
func (d *Driver) enter(id, path string) (*entry, error) {
	for {
		e, err := d.find(id, path)
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

func (d *Driver) find(id, path string) (*entry, error) {
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
	}
	e = &entry{id: id, path: path}
	d.volumes[id], d.targets[path] = e, id
	return e, nil
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
