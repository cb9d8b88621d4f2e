// Package underlay sends and receives batches of packets on UDP sockets and on
// raw sockets of the IP-in-IP protocols 4 and 41, over IPv4 and IPv6.
//
// UDP messages may be trains: many datagrams of equal size handed to the kernel
// as one (UDP_SEGMENT) and taken from it as one (UDP_GRO). Where the kernel or
// a device refuses a train, Send sends its datagrams one by one, at once, so
// that nothing is lost, and tries trains to that destination again later.
//
// Concurrency: a Socket may be used by several goroutines at once, but a
// RecvBatch and a SendBatch belong to one goroutine at a time, and one goroutine
// at a time may Wait. A Dest may be shared by all. Recv and Send allocate
// nothing.
//
// Sources: udp(7), raw(7), ip(7), ipv6(7), linux/udp.h, linux/errqueue.h,
// net/ipv4/udp.c, net/ipv4/raw.c; RFC 3168 and RFC 2474 for the TOS octet.
package underlay
