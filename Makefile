# The two commands of the README, and what they are made of. Both want root: labs are network namespaces.

GO ?= go

# What the tests use beside Go and the kernel. Other programs read, compare or break what Tulle does:
PACKAGES = \
	tshark tcpdump prometheus \
	iperf3 sockperf qperf ethtool iproute2 nftables iptables procps \
	containerd docker.io busybox-static containernetworking-plugins \
	debootstrap systemd-container lxc dbus iputils-ping \
	qemu-user lintian \
	clang-14 llvm-14 libbpf-dev

.PHONY: build demo test deps lint generate arm64 unit race repeat fuzz deb release simulate soak cnikill cnitime interop critest bench agree report clean

# Without cgo the programs are static: they run on any Linux, whatever its C library.
build:
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/ ./cmd/...

# Builds, then shows a cluster at work in a lab on this machine.
demo: build
	bin/tulle lab demo

# Installs what the tests need, and runs all of them.
test: deps lint arm64 build unit race fuzz

deps:
	.ci/install $(PACKAGES)

lint:
	.ci/lint

# The BPF programs of tunnel/fastpath, which are in the repository as clang 14 compiles them; `lint` checks that they are.
generate:
	$(GO) generate ./tunnel/fastpath

# For arm64: vet over everything, and the tests of the packages without I/O, under QEMU.
arm64:
	.ci/arm64

# The limit is that of a package: on a new machine, one makes trees of two Debian releases with debootstrap, and others wait for them.
unit:
	TULLE_NSPAWN=1 $(GO) test -timeout 60m ./...

# The race detector, where goroutines meet. Packages of pure functions have nothing for it to find.
race:
	.ci/race

# Quick tests under the race detector again and again, for half a minute a package, because one that fails now and then fails here; takes about
# 25 minutes. REPEAT=60 repeats longer, REPEATED=./internal/agent one package's.
repeat:
	.ci/repeat

# Every fuzz target for 10 or 30 seconds; FUZZTIME=10m takes that long for each.
fuzz:
	.ci/fuzz

# dist/tulle_VERSION_ARCH.deb for this machine.
deb:
	packaging/build deb $$($(GO) env GOARCH)

# Packages and archives for both architectures, and their checksums. The same commit gives the same bytes.
release:
	rm -rf dist
	for arch in amd64 arm64; do packaging/build deb $$arch && packaging/build archive $$arch || exit 1; done
	cd dist && sha256sum -- * >SHA256SUMS

# Ten times as many schedules of who owns which address, and of how clusters start, as `unit` runs; takes minutes.
simulate:
	TULLE_SIM_RUNS=20000 $(GO) test -timeout 60m -run 'TestSimulation(OfStarts)?$$' -v ./internal/ownership

# An hour of random faults in a cluster of four hosts, every packet checked. TULLE_SOAK=10m is shorter; TULLE_SOAK_REPORT names a file for the figures.
soak:
	TULLE_SOAK=$${TULLE_SOAK:-1h} $(GO) test -count=1 -timeout 3h -v ./internal/lab/soak

# 300 containers come and go, 16 at a time, while plugin and agent are killed at random (`unit` has 80); takes a minute.
cnikill:
	TULLE_CNI_CYCLES=300 $(GO) test -count=1 -timeout 10m -run 'TestCNIKill$$' -v ./internal/lab/clustertest

# How long an ADD takes, beside the reference plugins bridge and host-local, in turns.
cnitime:
	TULLE_CNI_ADDS=200 $(GO) test -count=1 -timeout 10m -run 'TestCNITime$$' -v ./internal/lab/clustertest

# How far this benchmark and iperf3, sockperf and qperf agree where the machine is the limit, in turns; wants a quiet machine.
agree:
	.ci/install $(PACKAGES)
	TULLE_AGREE=15 $(GO) test -count=1 -timeout 20m -run 'TestAgreesWithOtherTools$$' -v ./bench/pair

# Against the tunnels of Debian's kernel, booted by QEMU in software, benchmarks of them, and the fast path in it; takes three minutes, and downloads a kernel once.
interop:
	.ci/install qemu-system-x86 busybox-static iproute2 nftables
	kernel=$$(.ci/kernel) && TULLE_INTEROP=$$kernel $(GO) test -count=1 -timeout 15m -v ./internal/lab/interop

# The Kubernetes project's tests of container runtimes, those about networking, with containerd; builds them once, which takes a minute or two.
critest:
	.ci/install containerd containernetworking-plugins busybox-static iproute2 nftables iptables
	critest=$$(.ci/critest) && TULLE_CRITEST=$$critest $(GO) test -count=1 -timeout 10m -run 'TestCRITest$$' -v ./internal/lab/clustertest

# Tulle beside no tunnel, the kernel's VXLAN and wireguard-go; takes minutes, wants a quiet machine.
bench: build
	bin/tulle bench all

# The published run: docs/bench, and the table of the README drawn from it; takes about 22 minutes, wants a quiet machine.
report: build
	bin/tulle bench all --rounds 7 -v --report docs/bench
	.ci/bench-table bin/tulle

clean:
	rm -rf bin dist
