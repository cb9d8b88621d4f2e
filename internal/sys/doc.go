// Package sys contains all uses of unsafe and all raw system calls of the module.
// It provides thin wrappers whose memory is allocated once: message batches
// (recvmmsg, sendmmsg), TUN reads and writes, waiting on a file descriptor, socket
// options, TUN ioctls, network namespaces, and a netlink handle that retries
// interrupted dumps.
//
// Concurrency: a RecvMsgs or SendMsgs belongs to one goroutine at a time.
// Event and Poller.Wake may be used from any goroutine. Calls documented as
// non-blocking use RawSyscall, which bypasses the Go scheduler: use them only on
// non-blocking descriptors.
//
// Pointers for the kernel (in struct iovec, struct msghdr) are ordinary typed Go
// pointers in heap objects. So the garbage collector keeps their targets alive, and
// Go's heap does not move objects.
//
// Sources: Linux include/uapi/linux/{if_tun,virtio_net,udp,errqueue,in,in6}.h,
// recvmmsg(2), sendmmsg(2), cmsg(3), eventfd(2), network_namespaces(7).
package sys
