// Package interop has tests against the tunnel devices of another Linux: Debian's kernel, booted by QEMU in software, as an
// external peer of a real agent, and as the machine of a benchmark of such devices. They need root, QEMU, busybox and the kernel that `make interop` unpacks.
package interop
