// Package underlay sends and receives batches of packets on UDP sockets and on
// raw sockets of the IP-in-IP protocols 4 and 41, over IPv4 and IPv6.
//
// A UDP message may be a train: many datagrams of equal size that are sent
// (UDP_SEGMENT) or received (UDP_GRO) with one system call. If the kernel or a
// device refuses a train, Send sends its datagrams one by one at once, so that
// nothing is lost, and tries trains to that destination again later.
//
// Concurrency: a Socket may be used by several goroutines at once, but a
// RecvBatch and a SendBatch belong to one goroutine at a time, and one goroutine
// at a time may Wait. Goroutines may share a Dest. Recv and Send allocate
// nothing.
//
// Sources: udp(7), raw(7), ip(7), ipv6(7), linux/udp.h, linux/errqueue.h,
// net/ipv4/udp.c, net/ipv4/raw.c; RFC 3168 and RFC 2474 for the TOS octet.
package underlay
