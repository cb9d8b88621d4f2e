// Package offload turns TSO/USO super-packets into wire packets and back,
// touching headers only: payload is never copied, only pointed at and summed.
//
// A Splitter cuts what the kernel hands out of a TUN device (one packet of up to
// 64 KiB behind a virtio-net header) into segments whose headers it writes into an
// arena. A Joiner does the reverse for packets that came from a peer, by the rules
// of the kernel's generic receive offload, so that one write gives the TUN a
// whole run of a flow.
//
// Everything here is a pure function over buffers. A Splitter or Joiner belongs
// to one goroutine and allocates nothing once made. Packets begin with their IP
// header. No input, however hostile, makes it panic.
//
// Sources: linux/virtio_net.h, net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c,
// net/ipv4/af_inet.c, net/ipv6/ip6_offload.c; RFC 9293 (TCP), RFC 768 (UDP),
// RFC 3168 (CWR), RFC 6864 (IPv4 ID).
package offload
