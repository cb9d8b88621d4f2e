// Package device opens and drives the TUN device: packets go in and out with a
// virtio-net header of 10 bytes before them, so that one of them may be a
// super-packet of up to 64 KiB (TSO, USO) whose checksum is still to be made.
//
// The device is opened with flags of our own, handed to
// golang.zx2c4.com/wireguard/tun, and read and written here by non-blocking
// system calls. It may outlive the process (Persist), and Open takes up again
// what an earlier run left.
//
// Concurrency: each Queue has one reader and one writer, which may be different
// goroutines. Wake, and the Device's methods but Close, may be called from any.
//
// Sources: Documentation/networking/tuntap.rst, linux/if_tun.h,
// linux/virtio_net.h, drivers/net/tun.c, net/core virtio_net_hdr_to_skb.
package device
