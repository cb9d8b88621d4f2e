package api

import (
	"net/netip"
	"strings"
	"time"
)

// Engines that make pods: the first part of a PodID.
const (
	EngineTulle  = "tulle" // `tulle pod add`
	EngineCNI    = "cni"
	EngineDocker = "docker"
	EnginePodman = "podman"
)

// PodID names one interface of one pod on this node. Its text is the ID of the allocation, of the link's alias, and what the
// name of the host's end is made of.
type PodID struct {
	Engine    string `json:"engine"`
	Network   string `json:"network"`   // the engine's name for it
	Container string `json:"container"` // the engine's ID, or the pod's name
	Interface string `json:"interface"` // in the pod
}

// String is "engine/network/container/interface".
func (p PodID) String() string {
	return strings.Join([]string{p.Engine, p.Network, p.Container, p.Interface}, "/")
}

// ParsePodID reads what String has written. Allocations that others made have IDs of their own form.
func ParsePodID(s string) (PodID, bool) {
	parts := strings.Split(s, "/")
	if len(parts) != 4 {
		return PodID{}, false
	}
	return PodID{parts[0], parts[1], parts[2], parts[3]}, true
}

// States of a Pod.
const (
	PodUp       = "up"       // it has addresses and a link
	PodUnwired  = "unwired"  // it has addresses and no link of ours: it is being made, it is gone, or somebody else wires it
	PodUnknown  = "unknown"  // it has a link, and its addresses are not allocated
	PodMismatch = "mismatch" // its link has other addresses than it was given
)

// Pod is one pod interface on this node: an allocation with its link.
type Pod struct {
	ID            string       `json:"id"`
	PodID                      // empty if the ID has another form
	Name          string       `json:"name,omitempty"`
	Addresses     []netip.Addr `json:"addresses"`
	State         string       `json:"state"`
	Since         time.Time    `json:"since,omitzero"`
	Netns         string       `json:"netns,omitempty"`
	HostInterface string       `json:"host_interface,omitempty"`
	MTU           int          `json:"mtu,omitempty"`
	Dropped       uint64       `json:"dropped"` // packets that the source checks dropped
}
