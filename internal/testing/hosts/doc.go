// Package hosts builds hosts for tests as they come in the field: with whatever interfaces, addresses, routes and MTUs, with
// an /etc/hosts and a resolv.conf of their own, with an agent as a real process. Where internal/lab makes one tidy data
// centre, this makes the odd hosts out of the same parts. For tests only, and for root.
//
//	func TestMain(m *testing.M) { os.Exit(hosts.Main(m)) } // once in a package: builds the program when it is needed
//
//	func TestSeedNameWithAllAddresses(t *testing.T) {
//		n := hosts.New(t)
//		sw := n.Switch()
//		a, b := n.Host("a"), n.Host("b")
//		a.Plug(sw, "eth0", "10.0.1.11/24")
//		b.Plug(sw, "eth0", "10.0.1.12/24")
//		for _, h := range []*hosts.Host{a, b} {
//			h.EtcHosts("10.0.1.11 seeds", "10.0.1.12 seeds") // again later: a running agent sees it
//		}
//		first := a.Agent("--bootstrap", "--join", "seeds")
//		second := b.Agent("--join", "seeds")
//		first.Ready(20 * time.Second)
//		second.Ready(20 * time.Second)
//		pod, other := first.Pod("web"), second.Pod("db")
//		hosts.Within(t, 10*time.Second, "pods reach each other", func() error { return pod.Ping(other.IPv4()) })
//	}
//
// What a host can be made to do, beside that:
//
//	a.Link("up1", "10.0.1.5/30", s1, "down1", "10.0.1.6/30")       // a wire to another host, addresses "" for none
//	a.IP("addr add 10.255.0.1/32 dev lo", "link set eth0 mtu 1400") // lines for `ip -batch`
//	a.Sysctl("net.ipv4.conf.all.rp_filter", "1")
//	a.Run("nft", "add table inet t")                                // any program, in the host's namespaces
//	a.Do(func() error { … })                                        // any code, in its network namespace
//	a.ResolvConf("nameserver 10.0.1.53"); a.WriteFile("tulle.yaml", text); a.WipeDisk()
//	dns := a.DNS("10.0.1.53"); dns.Set("seeds", "10.0.1.11"); dns.Hang(true)
//	stop := a.Advertise("eth0", "fd00:1::/64", time.Hour)           // router advertisements
//	first.Stop(); first.Kill(); first = a.Agent(…)                  // on the same disk, with other arguments
//	first.Status(); first.Problems(); first.Log(); first.Ended(d); first.Tulle("peers")
//	s := pod.Stream(addr, 10*time.Millisecond); …; sent, lost := s.Stop()
//
// A failure of the set-up itself ends the test. Everything is removed when the test ends, also if it fails; what an agent
// logged is shown then, and an agent that panicked or raced fails its test. Names begin with a prefix that only this
// test has, so tests may run in parallel, within a process and beside others.
//
// Concurrency: the methods of one Net are called from its test's goroutine; Ping and Within from any.
package hosts
