package api

// Names of the checks of `tulle doctor` that a Problem belongs to. The doctor has more checks than these.
const (
	CheckConfig     = "config"     // the configuration against the cluster's
	CheckFirewall   = "firewall"   // chains that drop forwarded packets
	CheckRPFilter   = "rp_filter"  // strict reverse path filters
	CheckRoutes     = "routes"     // addresses and routes of others inside the cluster's space
	CheckForwarding = "forwarding" // the host's routes, addresses and sysctls are as the agent wants them
	CheckTunnels    = "tunnels"    // devices of the kernel that take the agent's packets
	CheckUnderlay   = "underlay"   // the address and the links that carry the tunnel
	CheckMTU        = "mtu"        // sizes that the underlay carries
	CheckFastPath   = "fast_path"  // BPF programs that carry packets
	CheckTrains     = "trains"     // UDP_SEGMENT
	CheckPaths      = "paths"      // encapsulations that get through
	CheckGossip     = "gossip"     // gossip, its seeds and its keys
	CheckIdentity   = "identity"   // IDs and names that several hosts have
	CheckCluster    = "cluster"    // several clusters
	CheckSpace      = "space"      // address space: lost, claimed twice, used up
	CheckOwners     = "owners"     // owners of space that are gone
	CheckState      = "state"      // the state on disk
	CheckVersions   = "versions"   // versions of the program
	CheckConntrack  = "conntrack"  // a full connection tracking table
	CheckNeighbours = "neighbours" // a full neighbour table
	CheckCNI        = "cni"        // what container engines see
)
