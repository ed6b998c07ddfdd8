package workloads

// Port is the endpoint's port for a service's.
func (e Endpoint) Port(service uint16) uint16 {
	if target, ok := e.Ports[service]; ok {
		return target
	}
	return service
}

// DeclaredPorts says, by pod UID and port, which protocol is declared: what the
// workload says itself, and for its other ports what services do. Empty means that
// services disagree or say nothing: such a port is told apart by first bytes.
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
	for _, s := range f.Services {
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
