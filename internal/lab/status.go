package lab

import (
	"context"
	"sync"

	"github.com/tulle-net/tulle/internal/api"
)

// Status is the data of `tulle lab status`.
type Status struct {
	Name    string       `json:"name"`
	Subnets int          `json:"subnets"`
	Hosts   []HostStatus `json:"hosts"`
	Pods    []Pod        `json:"pods"`
}

// HostStatus is a host with the status of its agent. Exactly one of Agent and Error is set; none in a bare lab.
type HostStatus struct {
	Host
	Runs  bool        `json:"runs"` // its agent's process
	Agent *api.Status `json:"agent,omitempty"`
	Error string      `json:"error,omitempty"`
}

// Healthy reports whether every agent is running and healthy.
func (s *Status) Healthy() bool {
	for _, h := range s.Hosts {
		if h.Error != "" || h.Agent != nil && !h.Agent.Healthy() {
			return false
		}
	}
	return true
}

// Status asks all agents in parallel.
func (l *Lab) Status(ctx context.Context) Status {
	st := Status{Name: l.Name(), Subnets: l.st.Options.Subnets, Pods: l.Pods()}
	for _, h := range l.Hosts() {
		st.Hosts = append(st.Hosts, HostStatus{Host: h, Runs: process{h.PID, h.StartTime}.alive()})
	}
	var wg sync.WaitGroup
	for i := range st.Hosts {
		h := &st.Hosts[i]
		if !l.hasAgent(&h.Host) {
			continue
		}
		wg.Go(func() {
			a, err := api.NewClient(h.Socket).Status(ctx)
			if err != nil {
				h.Error = err.Error()
				return
			}
			h.Agent = &a
		})
	}
	wg.Wait()
	return st
}
