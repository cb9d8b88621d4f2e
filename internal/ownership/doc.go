// Package ownership decides which node owns which part of the cluster's address
// space, and how ownership changes: a node asks for space, donates space, leaves,
// forgets a dead node, and confirms after a restart what it owned before. Each node
// has one state machine, a [Machine]. It connects the replicated table (package
// membership) with the node's own blocks, pod addresses and state file (package
// ipam), and exchanges messages with the machines of other nodes.
//
// The package opens no socket and reads no clock. Time is passed in. Messages are
// bytes that go through [Machine.HandleMessage] and a small [Env]. So the agent and
// the deterministic simulation (sim_test.go) run exactly the same code.
//
//	           cluster known                    first blocks opened
//	Waiting ─────────────────────▶ Joining ───────────────────────▶ Ready ──▶ Leaving ──▶ Left
//	   │ bootstrap set, no member    ▲  │ no free space: stays,       ▲
//	   │ is in a cluster             │  │ reports who owns how much   │
//	   └─────────────────────────────│──│─────────────────────────────┘
//	                                 │  ▼
//	state on disk ──▶ Confirming ────┴──────────────────▶ (Ready, when it still owns its blocks)
//
// Concurrency: all methods may be called from any goroutine. The Env's methods
// are called with the Machine's lock held: they must not call back, and Send and
// Broadcast must only queue.
//
// Sources: the design of Weave Net's IPAM and its bugs (weave #1875, #3569,
// #3908), flannel's leases (#1289, #805).
package ownership
