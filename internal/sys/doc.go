// Package sys is the module's only home of unsafe and of raw system calls. It
// gives the packages above it system-call-shaped building blocks whose memory
// is allocated once: vectored message batches (recvmmsg, sendmmsg), TUN reads
// and writes, waiting on a file descriptor, socket options, TUN ioctls,
// network namespaces and a netlink handle which retries interrupted dumps.
//
// Concurrency: a RecvMsgs or SendMsgs belongs to one goroutine at a time.
// Event and Poller.Wake may be used from any goroutine. Calls documented as
// non-blocking go to the kernel by RawSyscall, without telling the Go
// scheduler: they must be used on non-blocking descriptors only.
//
// Pointers that the kernel reads (struct iovec, struct msghdr) are ordinary,
// typed Go pointers stored in heap objects, so the garbage collector keeps
// what they point at alive; Go's heap does not move.
//
// Sources: Linux include/uapi/linux/{if_tun,virtio_net,udp,errqueue,in,in6}.h,
// recvmmsg(2), sendmmsg(2), cmsg(3), eventfd(2), network_namespaces(7).
package sys
