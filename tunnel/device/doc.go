// Package device opens, reads and writes the TUN device. Each packet has a
// virtio-net header of 10 bytes in front, so it may be a super-packet of up to
// 64 KiB (TSO, USO) with a partial checksum.
//
// The package opens the device with its own flags, passes the descriptor to
// golang.zx2c4.com/wireguard/tun, and reads and writes it with non-blocking
// system calls. The device may outlive the process (Persist); Open attaches to a
// device that an earlier run left.
//
// Concurrency: each Queue has one reader and one writer, which may be different
// goroutines. Wake, and all methods of Device except Close, may be called from any
// goroutine.
//
// Sources: Documentation/networking/tuntap.rst, linux/if_tun.h,
// linux/virtio_net.h, drivers/net/tun.c, net/core virtio_net_hdr_to_skb.
package device
