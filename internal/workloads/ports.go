package workloads

// Port is the endpoint's port for a service's. Of a Resolved file it is only for
// ports that PortOf knows.
func (e Endpoint) Port(service uint16) uint16 {
	if target, ok := e.Ports[service]; ok {
		return target
	}
	return service
}

// PortOf is the endpoint's port for a service's, false where it does not serve it.
func (f *File) PortOf(e Endpoint, service uint16) (uint16, bool) {
	if _, ok := e.Ports[service]; !ok && f.Resolved {
		return 0, false
	}
	return e.Port(service), true
}

// DeclaredPorts says, by pod UID and port, which protocol is declared: what the
// workload says itself, and for its other ports what services do. Empty means that
// services disagree or say nothing: such a port is told apart by first bytes. Of a
// Resolved file the workloads have said it all.
func (f *File) DeclaredPorts() map[string]map[uint16]string {
	out := make(map[string]map[uint16]string, len(f.Workloads))
	of := func(uid string) map[uint16]string {
		ports := out[uid]
		if ports == nil {
			ports = map[uint16]string{}
			out[uid] = ports
		}
		return ports
	}
	services := f.Services
	if f.Resolved {
		services = nil
	}
	for _, s := range services {
		for _, e := range s.Endpoints {
			for _, p := range s.Ports {
				ports, number := of(e.Workload), e.Port(p.Number)
				if have, ok := ports[number]; ok && have != p.Protocol {
					ports[number] = ""
				} else {
					ports[number] = p.Protocol
				}
			}
		}
	}
	for i := range f.Workloads {
		ports := of(f.Workloads[i].PodUID)
		for _, p := range f.Workloads[i].Ports {
			ports[p.Number] = p.Protocol
		}
	}
	return out
}
