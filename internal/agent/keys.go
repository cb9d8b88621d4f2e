package agent

import (
	"cmp"
	"context"
	"slices"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/membership"
	"github.com/tulle-net/tulle/membership/gossip"
	"github.com/tulle-net/tulle/membership/keyring"
)

// Keys implements api.Backend.
func (a *agent) Keys(ctx context.Context) (api.KeyList, error) {
	s, err := a.current()
	if err != nil {
		return api.KeyList{}, err
	}
	if s.cfg.GossipKeyFile == "" {
		return api.KeyList{}, nil
	}
	r, err := s.gossip.KeyList(ctx)
	if err != nil {
		return api.KeyList{}, coded(err)
	}
	absent := s.absent(r)
	out := api.KeyList{Encrypted: true, Members: len(r.Answers) + len(absent)}
	var order []keyring.Fingerprint
	has := map[keyring.Fingerprint]map[membership.NodeID]bool{}
	for _, m := range r.Answers {
		if m.Err != "" {
			out.Silent = append(out.Silent, api.NodeRef{Name: m.Name, ID: m.ID.String()})
			continue
		}
		out.Answered++
		for _, k := range m.Keys {
			if has[k.Fingerprint] == nil {
				has[k.Fingerprint] = map[membership.NodeID]bool{}
				order = append(order, k.Fingerprint)
			}
			has[k.Fingerprint][m.ID] = true
		}
	}
	for _, fp := range order {
		k := api.Key{ID: fp.String(), Members: len(has[fp])}
		for i, m := range r.Answers {
			if m.Err != "" {
				continue
			}
			if !has[fp][m.ID] {
				k.Missing = append(k.Missing, m.Name)
			}
			if i == 0 && len(m.Keys) > 0 && m.Keys[0].Fingerprint == fp { // this node's own answer comes first
				k.Primary = true
			}
		}
		out.Keys = append(out.Keys, k)
	}
	out.Silent = append(out.Silent, absent...)
	return out, nil
}

// KeyInstall implements api.Backend.
func (a *agent) KeyInstall(ctx context.Context, req api.KeyRequest) (api.KeyResult, error) {
	s, err := a.current()
	if err != nil {
		return api.KeyResult{}, err
	}
	r, err := s.gossip.KeyInstall(ctx, req.Key)
	return s.keyResult(keyring.FingerprintOf(req.Key), r, err)
}

// KeyUse implements api.Backend.
func (a *agent) KeyUse(ctx context.Context, req api.KeyRequest) (api.KeyResult, error) {
	return a.keyOperation(ctx, req, (*gossip.Gossip).KeyUse)
}

// KeyRemove implements api.Backend.
func (a *agent) KeyRemove(ctx context.Context, req api.KeyRequest) (api.KeyResult, error) {
	return a.keyOperation(ctx, req, (*gossip.Gossip).KeyRemove)
}

func (a *agent) keyOperation(ctx context.Context, req api.KeyRequest,
	op func(*gossip.Gossip, context.Context, keyring.Fingerprint) (gossip.KeyReport, error),
) (api.KeyResult, error) {
	s, err := a.current()
	if err != nil {
		return api.KeyResult{}, err
	}
	var fp keyring.Fingerprint
	if len(req.Key) > 0 {
		fp = keyring.FingerprintOf(req.Key)
	} else if fp, err = s.gossip.FindKey(ctx, req.ID); err != nil {
		return api.KeyResult{}, api.Errorf(api.CodeNotFound, "%v", err)
	}
	r, err := op(s.gossip, ctx, fp)
	return s.keyResult(fp, r, err)
}

// absent are the members that were not asked, since gossip does not hold them for alive or does not know them at all: nodes that
// own space, and those that were ever seen and have not left.
func (s *session) absent(r gossip.KeyReport) (out []api.NodeRef) {
	known := map[membership.NodeID]string{}
	for _, e := range s.ownership.Entries() {
		known[e.Owner] = ""
	}
	for _, p := range s.ownership.Peers() {
		known[membership.NodeID(p.ID)] = p.Name
	}
	for _, m := range r.Answers { // this node's own is one of them
		delete(known, m.ID)
	}
	for id, name := range known {
		out = append(out, api.NodeRef{Name: name, ID: id.String()})
	}
	slices.SortFunc(out, func(a, b api.NodeRef) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return out
}

// keyResult lists who did it and who did not.
func (s *session) keyResult(fp keyring.Fingerprint, r gossip.KeyReport, err error) (api.KeyResult, error) {
	if err != nil {
		return api.KeyResult{}, coded(err)
	}
	absent := s.absent(r)
	out := api.KeyResult{ID: fp.String(), Members: len(r.Answers) + len(absent)}
	for _, m := range r.Answers {
		if m.Err == "" {
			out.Done++
			continue
		}
		out.Failed = append(out.Failed, api.KeyFailure{Node: api.NodeRef{Name: m.Name, ID: m.ID.String()}, Why: m.Err})
	}
	for _, n := range absent {
		out.Failed = append(out.Failed, api.KeyFailure{Node: n, Why: "not alive: it needs the new key in its key file before it can return"})
	}
	return out, nil
}
