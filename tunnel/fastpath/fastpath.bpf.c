//go:build ignore

// Carries packets of pods between hosts as IP in IP (RFC 2003, 4213 and 2473), or in UDP over IPv4 (GUE variant 1), in place of the agent's
// workers. doc.go says what it carries and why it drops nothing: whatever is unusual goes on to the agent.
//
// Where a packet is in the kernel: net/core/dev.c (sch_handle_egress and sch_handle_ingress); what the helpers do: net/core/filter.c.
//
// Without CAP_PERFMON, the verifiers of kernels before 6.8 refuse a store of less than eight bytes to a part of the stack where any other value was
// stored (kernel/bpf/verifier.c, "attempt to corrupt spilled pointer on stack"). So what is on the stack here consists of __u64, in which addresses and
// headers are as in memory: the programs are little-endian.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// Since Linux 6.3, and so perhaps not in the headers that this is compiled with.
#define DECAP_L3_IPV4 (1ULL << 7)
#define DECAP_L3_IPV6 (1ULL << 8)

#define NEXT TC_ACT_UNSPEC // the next filter, then the kernel's usual way, which ends at the agent

#define FRAGMENT 0x3fff // "more fragments" and the offset
#define DONT_FRAGMENT 0x4000
#define TTL 64
#define TCP_SYN 0x02
#define TCPOPT_MSS 2
#define ECN 3
#define FIRST_SOURCE_PORT 0xc000 // RFC 6335, "dynamic ports": 49152 to 65535
#define CHECKED 0x74756c6c // skb->mark between receive and deliver

// An address of either family; IPv4 as ::ffff:a.b.c.d.
struct addr {
	__u64 d[2];
};

// Whose an address is. Peers have the numbers from 2.
enum {
	AGENT = 0, // nobody's that concerns this program
	OWN = 1,   // this node's
};

struct prefix {
	__u32 bits;
	__u32 addr[4];
};

// Whose the pods are that have an address: this node's, or a peer's.
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 18);
	__type(key, struct prefix);
	__type(value, __u32);
} spaces SEC(".maps");

// Whose a host is that has an underlay address.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, struct addr);
	__type(value, __u32);
} hosts SEC(".maps");

// How packets to a peer leave. A peer to which the agent sends has no entry.
struct way {
	struct addr from, to; // of one family
	__u32 link;           // index of the device
	__u32 mtu;            // largest packet of the pods, in bytes
	__u32 port;           // of the peer, for udp; 0: ipip
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, __u32);
	__type(value, struct way);
} ways SEC(".maps");

// What was carried: packets and super-packets of the pods, and their bytes.
struct counts {
	__u64 tx_packets, tx_bytes, rx_packets, rx_bytes, lost;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 16);
	__type(key, __u32);
	__type(value, struct counts);
} counters SEC(".maps");

// Flows of UDP, by their hash, that have sent super-packets. In UDP the agent carries all of such a flow: a super-packet of UDP in UDP that no wire
// cuts would be cut wrongly behind the receiver, and what the two carry would overtake each other.
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1 << 12);
	__type(key, __u32);
	__type(value, __u8);
} trains SEC(".maps");

struct settings {
	__u64 paused;     // until then, in nanoseconds of CLOCK_MONOTONIC, the agent carries everything; 0: it does not want to
	__u32 on;         // 0: the agent carries everything
	__u32 tun;        // index of the TUN device
	__u32 joint;      // index of the device behind which TCP out of UDP is joined
	__u32 port;       // of udp, here; 0: the agent receives what comes by udp
	__u32 generation; // of the tables: another one after each change, and not 0
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} setting SEC(".maps");

// Addresses of packets that came lately and whose they are, by a hash of the inner ones: one lookup for most packets instead of four.
#define SEEN 256
#define GOLDEN 0x9e3779b1
struct seen {
	struct addr outer_src, outer_dst, inner_src, inner_dst;
	__u32 who, generation;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, SEEN);
	__type(key, __u32);
	__type(value, struct seen);
} cache SEC(".maps");

// What the program needs to know of an IP header.
struct ip {
	struct addr src, dst;
	__u64 length; // of the packet, in bytes
	__u64 header; // its own, in bytes
	__u64 tos, proto, six;
};

static __always_inline void from4(struct addr *a, __be32 v)
{
	a->d[0] = 0;
	a->d[1] = bpf_htonl(0xffff) | (__u64)v << 32;
}

static __always_inline __be32 to4(const struct addr *a)
{
	return a->d[1] >> 32;
}

static __always_inline void from6(struct addr *a, const struct in6_addr *v)
{
	a->d[0] = v->s6_addr32[0] | (__u64)v->s6_addr32[1] << 32;
	a->d[1] = v->s6_addr32[2] | (__u64)v->s6_addr32[3] << 32;
}

static __always_inline int is4(const struct addr *a)
{
	return a->d[0] == 0 && (__u32)a->d[1] == bpf_htonl(0xffff);
}

// Reads the IP header at off. Returns 0 for a whole packet without options whose TTL is left, else -1.
static __always_inline int parse(struct __sk_buff *skb, __u32 off, struct ip *p)
{
	union {
		struct iphdr v4;
		struct ipv6hdr v6;
		__u64 aligned[5];
	} h;

	if (bpf_skb_load_bytes(skb, off, &h, sizeof(h.v4)))
		return -1;
	if (h.v4.version == 4) {
		if (h.v4.ihl != 5 || h.v4.frag_off & bpf_htons(FRAGMENT) || h.v4.ttl == 0)
			return -1;
		from4(&p->src, h.v4.saddr);
		from4(&p->dst, h.v4.daddr);
		p->length = bpf_ntohs(h.v4.tot_len);
		p->header = sizeof(h.v4);
		p->tos = h.v4.tos;
		p->proto = h.v4.protocol;
		p->six = 0;
		return 0;
	}
	if (h.v4.version != 6 || bpf_skb_load_bytes(skb, off, &h, sizeof(h.v6)) || h.v6.hop_limit == 0)
		return -1;
	from6(&p->src, &h.v6.saddr);
	from6(&p->dst, &h.v6.daddr);
	if (is4(&p->src) || is4(&p->dst))
		return -1; // IPv4-mapped: no packet may have such an address (RFC 6890 section 2.2.3)
	p->length = sizeof(h.v6) + bpf_ntohs(h.v6.payload_len);
	p->header = sizeof(h.v6);
	p->tos = h.v6.priority << 4 | h.v6.flow_lbl[0] >> 4;
	p->proto = h.v6.nexthdr;
	p->six = 1;
	return 0;
}

static __always_inline __u32 owner(const struct addr *a)
{
	__u64 k[3] = {128 | a->d[0] << 32, a->d[0] >> 32 | a->d[1] << 32, a->d[1] >> 32}; // a struct prefix
	__u32 *who = bpf_map_lookup_elem(&spaces, k);

	return who ? *who : AGENT;
}

static __always_inline __u32 host(const struct addr *a)
{
	__u32 *who = bpf_map_lookup_elem(&hosts, a);

	return who ? *who : AGENT;
}

static __always_inline int same(const struct addr *a, const struct addr *b)
{
	return !((a->d[0] ^ b->d[0]) | (a->d[1] ^ b->d[1]));
}

// The peer whose packet this is by its addresses: between a peer and this host outside, between their pods inside. AGENT if it is none.
static __always_inline __u32 sender(const struct ip *outer, const struct ip *inner, __u32 generation)
{
	__u32 mixed = (__u32)(inner->src.d[1] ^ inner->src.d[1] >> 32) * GOLDEN ^ (__u32)(inner->dst.d[1] ^ inner->dst.d[1] >> 32);
	__u64 i = mixed * GOLDEN / (0x100000000 / SEEN); // the upper bits of Fibonacci hashing
	struct seen *seen = bpf_map_lookup_elem(&cache, &i);
	__u32 who;

	if (!seen) // it never is, and later checks for it would look like a way around this one to verifiers that follow speculation
		return AGENT;
	if (seen->generation == generation && same(&seen->inner_src, &inner->src) && same(&seen->inner_dst, &inner->dst) &&
	    same(&seen->outer_src, &outer->src) && same(&seen->outer_dst, &outer->dst))
		return seen->who;
	who = host(&outer->src);
	if (who <= OWN || host(&outer->dst) != OWN || owner(&inner->src) != who || owner(&inner->dst) != OWN)
		return AGENT;
	seen->outer_src = outer->src;
	seen->outer_dst = outer->dst;
	seen->inner_src = inner->src;
	seen->inner_dst = inner->dst;
	seen->who = who;
	seen->generation = generation;
	return who;
}

static __always_inline struct settings *enabled(void)
{
	__u64 zero = 0;
	struct settings *s = bpf_map_lookup_elem(&setting, &zero);

	return s && s->on && !(s->paused && bpf_ktime_get_ns() < s->paused) ? s : 0;
}

// Whether a SYN announces a segment size that the path takes, in its first option, where kernels put it. The agent lowers those that are larger, and
// looks for the option elsewhere (RFC 9293 section 3.7.1).
static __always_inline int fits(struct __sk_buff *skb, const struct ip *p, __u32 mtu)
{
	__u8 mss[4]; // kind, length, value

	if (bpf_skb_load_bytes(skb, p->header + sizeof(struct tcphdr), mss, sizeof(mss)))
		return 0;
	return mss[0] == TCPOPT_MSS && mss[1] == sizeof(mss) && (mss[2] << 8 | mss[3]) + p->header + sizeof(struct tcphdr) <= mtu;
}

// Whether a packet is of a protocol that is carried; behind IPv6, extension headers are none.
static __always_inline int known(const struct ip *p)
{
	return p->proto == IPPROTO_TCP || p->proto == IPPROTO_UDP || p->proto == (p->six ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
}

// Whether a packet or super-packet can go as it is.
static __always_inline int passes(struct __sk_buff *skb, const struct ip *p, __u32 mtu)
{
	__u32 header = p->header;
	__u8 tcp[2]; // data offset; flags

	if (!known(p))
		return 0;
	switch (p->proto) {
	case IPPROTO_TCP:
		if (bpf_skb_load_bytes(skb, p->header + 12, tcp, sizeof(tcp)))
			return 0;
		header += tcp[0] >> 4 << 2;
		if (tcp[1] & TCP_SYN && (header < p->header + sizeof(struct tcphdr) + 4 || !fits(skb, p, mtu)))
			return 0;
		break;
	case IPPROTO_UDP:
		header += sizeof(struct udphdr);
	}
	return (skb->gso_size ? header + skb->gso_size : p->length) <= mtu;
}

static __always_inline int of_train(struct __sk_buff *skb)
{
	__u64 hash = bpf_get_hash_recalc(skb);
	__u64 yes = 1;

	if (skb->gso_size)
		bpf_map_update_elem(&trains, &hash, &yes, BPF_ANY);
	return skb->gso_size || bpf_map_lookup_elem(&trains, &hash);
}

// The sum of the four halfwords of v, folded once.
static __always_inline __u32 sum(__u64 v)
{
	return (v & 0xffff) + (v >> 16 & 0xffff) + (v >> 32 & 0xffff) + (v >> 48);
}

// Puts n bytes of outer headers and an Ethernet header in front of a packet.
static __always_inline int prepend(struct __sk_buff *skb, const __u64 *h, __u32 n, __u16 type, __u64 flags)
{
	__u64 e[2] = {0, (__u64)bpf_htons(type) << 32}; // a struct ethhdr

	if (bpf_skb_adjust_room(skb, n, BPF_ADJ_ROOM_MAC, flags | BPF_F_ADJ_ROOM_FIXED_GSO))
		return NEXT;
	if (bpf_skb_store_bytes(skb, 0, h, n, 0) || bpf_skb_change_head(skb, sizeof(struct ethhdr), 0) ||
	    bpf_skb_store_bytes(skb, 0, e, sizeof(struct ethhdr), 0))
		return TC_ACT_SHOT;
	return TC_ACT_REDIRECT;
}

static __always_inline int encapsulate4(struct __sk_buff *skb, const struct ip *p, const struct way *w)
{
	__u64 h[4]; // a struct iphdr, and a struct udphdr
	__u64 flags = BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
	__u64 n = sizeof(struct iphdr), proto = p->six ? IPPROTO_IPV6 : IPPROTO_IPIP, source = 0, check;

	if (w->port) {
		n += sizeof(struct udphdr);
		proto = IPPROTO_UDP;
		source = bpf_htons(FIRST_SOURCE_PORT | (bpf_get_hash_recalc(skb) & ~FIRST_SOURCE_PORT & 0xffff));
		flags |= BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
	}
	h[0] = 0x45 | p->tos << 8 | (__u64)bpf_htons(n + p->length) << 16 | (__u64)bpf_htons(DONT_FRAGMENT) << 48;
	h[1] = TTL | proto << 8 | (__u64)to4(&w->from) << 32;
	h[2] = to4(&w->to) | source << 32 | (__u64)bpf_htons(w->port) << 48;
	h[3] = bpf_htons(sizeof(struct udphdr) + p->length);
	check = sum(h[0]) + sum(h[1]) + sum((__u32)h[2]);
	check = (check & 0xffff) + (check >> 16);
	check = (check & 0xffff) + (check >> 16);
	h[1] |= (~check & 0xffff) << 16;
	return prepend(skb, h, n, ETH_P_IP, flags);
}

static __always_inline int encapsulate6(struct __sk_buff *skb, const struct ip *p, const struct way *w)
{
	__u64 label = bpf_get_hash_recalc(skb) & 0xfffff; // RFC 6438: routers spread flows by it
	__u64 h[5] = {
		bpf_htonl(6 << 28 | p->tos << 20 | label) | (__u64)bpf_htons(p->length) << 32 |
			(p->six ? IPPROTO_IPV6 : IPPROTO_IPIP) * (1ULL << 48) | (__u64)TTL << 56,
		w->from.d[0], w->from.d[1], w->to.d[0], w->to.d[1],
	}; // a struct ipv6hdr

	return prepend(skb, h, sizeof(h), ETH_P_IPV6, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6);
}

// On the way into the TUN device: data begins with the IP header.
SEC("tc")
int send(struct __sk_buff *skb)
{
	struct ip p;
	struct counts *c;
	struct way *w;
	__u64 who;
	int act;

	if (!enabled() || parse(skb, 0, &p) || p.length != skb->len)
		return NEXT;
	who = owner(&p.dst);
	w = bpf_map_lookup_elem(&ways, &who);
	c = bpf_map_lookup_elem(&counters, &who);
	if (!w || !c || !passes(skb, &p, w->mtu) || p.length > 0xffff - sizeof(struct ipv6hdr) || same(&p.src, &w->to))
		return NEXT;
	if (p.proto == IPPROTO_UDP && of_train(skb))
		return NEXT;
	skb->mark = 0; // it is the pods' packet's: no mark decides how the outer one leaves
	if (is4(&w->to))
		act = encapsulate4(skb, &p, w);
	else
		act = encapsulate6(skb, &p, w);
	if (act == TC_ACT_SHOT)
		c->lost++;
	if (act != TC_ACT_REDIRECT)
		return act;
	c->tx_packets++;
	c->tx_bytes += p.length;
	return bpf_redirect_neigh(w->link, 0, 0, 0);
}

// Whether a UDP datagram is one that the fast path sends: to our port, without checksum. GRO joins none without checksum.
static __always_inline int datagram(struct __sk_buff *skb, const struct ip *outer, const struct settings *s)
{
	struct udphdr h;

	return s->port && !outer->six && !bpf_skb_load_bytes(skb, ETH_HLEN + outer->header, &h, sizeof(h)) &&
	       h.dest == bpf_htons(s->port) && h.check == 0 && bpf_ntohs(h.len) + outer->header == outer->length;
}

// On the way in from the underlay: data begins with the Ethernet header.
SEC("tc")
int receive(struct __sk_buff *skb)
{
	struct settings *s = enabled();
	struct ip outer, inner;
	struct counts *c;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO;
	__u64 who, header;

	if (!s || skb->pkt_type != 0 /* PACKET_HOST */ || skb->vlan_present ||
	    (skb->protocol != bpf_htons(ETH_P_IP) && skb->protocol != bpf_htons(ETH_P_IPV6)) || parse(skb, ETH_HLEN, &outer))
		return NEXT;
	header = outer.header;
	if (outer.proto == IPPROTO_UDP) {
		if (!datagram(skb, &outer, s))
			return NEXT;
		header += sizeof(struct udphdr);
	} else if (outer.proto != IPPROTO_IPIP && outer.proto != IPPROTO_IPV6) {
		return NEXT;
	}
	if (parse(skb, ETH_HLEN + header, &inner) || (outer.proto != IPPROTO_UDP && inner.six != (outer.proto == IPPROTO_IPV6)) ||
	    !known(&inner) || inner.length + header != outer.length || outer.length + ETH_HLEN != skb->len || ((inner.tos ^ outer.tos) & ECN))
		return NEXT;
	// What no wire has cut, if it is UDP in UDP, would be taken for a tunnel of the kernel's own and cut wrongly. No fast path sends it.
	if (outer.proto == IPPROTO_UDP && skb->gso_size && inner.proto != IPPROTO_TCP)
		return NEXT;
	who = sender(&outer, &inner, s->generation);
	c = bpf_map_lookup_elem(&counters, &who);
	if (!c)
		return NEXT;
	if (inner.six != outer.six)
		flags |= inner.six ? DECAP_L3_IPV6 : DECAP_L3_IPV4;
	if (bpf_skb_adjust_room(skb, -(__s32)header, BPF_ADJ_ROOM_MAC, flags))
		return NEXT;
	c->rx_packets++;
	c->rx_bytes += inner.length;
	if (outer.proto == IPPROTO_UDP && inner.proto == IPPROTO_TCP && !skb->gso_size) {
		__u64 six = bpf_htons(ETH_P_IPV6);

		if (inner.six)
			bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &six, sizeof(__be16), 0);
		skb->mark = CHECKED;
		return bpf_redirect(s->joint, 0);
	}
	skb->mark = 0; // it is the outer packet's
	return bpf_redirect(s->tun, BPF_F_INGRESS);
}

// Behind the joint, where the kernel has joined packets of a flow. Only those that have passed receive go on.
SEC("tc")
int deliver(struct __sk_buff *skb)
{
	__u64 zero = 0;
	struct settings *s = bpf_map_lookup_elem(&setting, &zero);

	if (!s || skb->mark != CHECKED)
		return TC_ACT_SHOT;
	skb->mark = 0;
	return bpf_redirect(s->tun, BPF_F_INGRESS);
}

char _license[] SEC("license") = "Apache-2.0";
