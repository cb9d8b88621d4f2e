// Package lab builds a small data centre out of network namespaces on this one machine: hosts in subnets, a router
// between them, and pods on the hosts, with a real agent for every host as a process of its own. `tulle lab`, the tests
// and the benchmarks use it.
//
//	   subnet 1 192.168.1.0/24      NAME-r        subnet 2 192.168.2.0/24
//	NAME-h1 eth0 ──┐         ┌── gw1  gw2 ──┐         ┌── eth0 NAME-h3
//	NAME-h2 eth0 ──┴── br1 ──┘    router    └── br2 ──┘
//	   │ veth-p1a
//	NAME-p1a eth0 (/32, next hop 169.254.1.1 as Calico does)
//
// The links between hosts carry frames of the MTU, as between NICs, unless Options.Wire says otherwise.
//
// Everything is done by netlink; no `ip`, no `nft` and no `ping` binary runs. Nothing is made in the machine's own network
// namespace: devices live and die with the lab's namespaces, so that labs cannot collide as long as their names differ.
//
// What a lab is lives in /run/tulle-lab/NAME/lab.json, written before the first namespace is made, and all names follow
// from it: a lab whose maker was killed at any moment is removed by Down, or by the next Up of that name.
//
// Concurrency: a Lab may be used by several goroutines; changes of the topology exclude each other. Code enters a
// namespace on a locked thread (Do); sockets that it makes there stay there.
package lab
