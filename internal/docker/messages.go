package docker

// The messages of the protocol, with the fields that are used here.

type empty struct{}

type failure struct{ Err string }

type manifest struct{ Implements []string }

type networkCapabilities struct{ Scope, ConnectivityScope string }

type ipamCapabilities struct{ RequiresMACAddress, RequiresRequestReplay bool }

type addressSpaces struct {
	Local  string `json:"LocalDefaultAddressSpace"`
	Global string `json:"GlobalDefaultAddressSpace"`
}

type networkRequest struct {
	NetworkID          string
	Options            map[string]any
	IPv4Data, IPv6Data []struct{ AddressSpace, Pool string }
}

type poolRequest struct {
	Pool, SubPool string // prefixes; empty: any
	V6            bool
}

type pool struct {
	PoolID, Pool string
	Data         map[string]string
}

type addressRequest struct {
	PoolID, Address string
	Options         map[string]string
}

type address struct{ Address string }

type endpointRequest struct {
	NetworkID, EndpointID string
	Interface             struct{ Address, AddressIPv6, MacAddress string }
}

// endpointResponse has nothing that the engine has given already.
type endpointResponse struct{ Interface struct{} }

type operInfo struct{ Value map[string]any }

type joinRequest struct{ NetworkID, EndpointID, SandboxKey string }

type joinResponse struct {
	InterfaceName         interfaceName
	Gateway, GatewayIPv6  string `json:",omitempty"`
	StaticRoutes          []staticRoute
	DisableGatewayService bool
}

type interfaceName struct{ SrcName, DstPrefix string }

type staticRoute struct {
	Destination string
	RouteType   int // 0: by NextHop
	NextHop     string
}

// onLink is the RouteType of a destination without next hop.
const onLink = 1
