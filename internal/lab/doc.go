// Package lab builds a small data centre from network namespaces on one machine: hosts in subnets, a router between them,
// and pods on the hosts. Every host has a real agent, which is a separate process. `tulle lab`, the tests and the benchmarks
// use it.
//
//	   subnet 1 192.168.1.0/24      NAME-r        subnet 2 192.168.2.0/24
//	NAME-h1 eth0 ──┐         ┌── gw1  gw2 ──┐         ┌── eth0 NAME-h3
//	NAME-h2 eth0 ──┴── br1 ──┘    router    └── br2 ──┘
//	   │ veth-p1a
//	NAME-p1a eth0 (/32, next hop 169.254.1.1 as Calico does)
//
// The links between hosts carry frames of at most the MTU, as between NICs, unless Options.Wire says otherwise.
//
// The package uses netlink; it runs no `ip`, `nft` or `ping` binary. It creates nothing in the machine's own network
// namespace: all devices exist in the namespaces of the lab, so labs with different names cannot collide.
//
// The state of a lab is /run/tulle-lab/NAME/lab.json. It is written before the first namespace is created, and determines all
// names. So Down, or the next Up with that name, can remove a lab whose creator was killed at any moment.
//
// Concurrency: several goroutines may use a Lab; changes of the topology exclude each other. Code enters a namespace on a
// locked thread (Do); sockets that it opens there stay there.
package lab
