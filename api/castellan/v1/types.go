package castellanv1

// Type URLs of the resources on the delta stream.
const (
	TypeWorkloadPolicy  = "type.googleapis.com/castellan.v1.WorkloadPolicy"
	TypeServiceIdentity = "type.googleapis.com/castellan.v1.ServiceIdentity"
	TypeJwks            = "type.googleapis.com/castellan.v1.Jwks"
	TypeBundle          = "type.googleapis.com/castellan.v1.Bundle"
	TypeDenylist        = "type.googleapis.com/castellan.v1.Denylist"
)

// DenylistName is the name of the one Denylist resource.
const DenylistName = "default"
