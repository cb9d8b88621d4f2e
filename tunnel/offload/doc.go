// Package offload splits super-packets (TSO, USO) into segments, and joins packets
// into super-packets. It writes headers only: payload is referenced and summed,
// never copied.
//
// A Splitter splits a packet of up to 64 KiB that was read from a TUN device behind
// a virtio-net header. It writes the headers of the segments into an arena. A
// Joiner joins consecutive packets of a flow that came from a peer, by the rules of
// the kernel's generic receive offload (GRO), so that one write to the TUN carries
// all of them.
//
// The package does no I/O. A Splitter or Joiner belongs to one goroutine and
// allocates nothing after its creation. Packets begin with their IP header. No
// input, however hostile, makes it panic.
//
// Sources: linux/virtio_net.h, net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c,
// net/ipv4/af_inet.c, net/ipv6/ip6_offload.c; RFC 9293 (TCP), RFC 768 (UDP),
// RFC 3168 (CWR), RFC 6864 (IPv4 ID).
package offload
