// Package clustertest tests whole clusters: real agents, as separate processes on the hosts of a lab, with real pods,
// over IPv4 and IPv6. It holds tests only.
//
// What a single package can prove is proven there; here is what needs several hosts: that pods and hosts reach each other
// through every encapsulation and are seen under their own addresses, that address space survives crashes, partitions and
// operators, and that what goes wrong is said in one line with its remedy.
//
// The tests need root and tshark. Each makes labs of its own, named after the test process, so that they may run side by
// side; none sends anything outside its namespaces. They wait for conditions, never for a time to pass.
package clustertest
