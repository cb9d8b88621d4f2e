package lab

import (
	"net/netip"
	"sync"
)

// Host is one host of the lab.
type Host struct {
	Name      string       `json:"name"` // h1, h2 …
	Number    int          `json:"number"`
	Netns     string       `json:"netns"`     // path of its network namespace
	Subnet    int          `json:"subnet"`    // 1, 2 …
	Underlay  []netip.Addr `json:"underlay"`  // addresses of its eth0, IPv4 first
	Dir       string       `json:"dir"`       // everything of its agent: configuration, state, socket, log
	Socket    string       `json:"socket"`    // of its agent
	Log       string       `json:"log"`       // of its agent
	Config    string       `json:"config"`    // of its agent
	Adopted   bool         `json:"adopted"`   // its agent was not started by the lab: AdoptAgent
	PID       int          `json:"pid"`       // of its agent; 0 if it was never started
	StartTime uint64       `json:"starttime"` // of that process, in clock ticks since boot: tells a reused PID
}

// Pod is one pod of the lab.
type Pod struct {
	Name      string       `json:"name"`   // p1a, p1b … on h1
	Number    int          `json:"number"` // number among the pods of its host, from 1
	Host      string       `json:"host"`
	Netns     string       `json:"netns"`
	ID        string       `json:"id"`        // the ID of its allocation at the agent
	Addresses []netip.Addr `json:"addresses"` // IPv4 first
	MTU       int          `json:"mtu"`
}

// Addr returns the pod's address of that family, or the zero Addr.
func (p *Pod) Addr(v6 bool) netip.Addr { return pick(p.Addresses, v6) }

// Addr returns the host's underlay address of that family, or the zero Addr.
func (h *Host) Addr(v6 bool) netip.Addr { return pick(h.Underlay, v6) }

func pick(addrs []netip.Addr, v6 bool) netip.Addr {
	for _, a := range addrs {
		if a.Is6() == v6 {
			return a
		}
	}
	return netip.Addr{}
}

// Lab is an existing lab.
type Lab struct {
	changing sync.Mutex // held from the beginning to the end of a change of the topology

	mu sync.Mutex // guards what follows
	st state
	// waits has a channel for each agent that this process started; it is closed once that agent is reaped.
	waits map[process]chan struct{}
}

// Name is the lab's name.
func (l *Lab) Name() string { return l.st.Options.Name }

// Options returns the options of the lab, with defaults filled in.
func (l *Lab) Options() Options { return l.st.Options }

// Router is the target name of the router for Exec, Do, Ping and so on.
const Router = "r"
