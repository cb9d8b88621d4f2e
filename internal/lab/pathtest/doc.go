// Package pathtest has tests of how packets find their way, with real agents on hosts in network namespaces: encapsulations
// that a router in the middle filters, MTUs that it lowers, trains that the wire breaks, while pods talk over it.
package pathtest
