// Package ownership decides who owns which part of the cluster's address space,
// and how it changes hands: a node asks for space, donates some, leaves, forgets
// a dead node, and confirms after a restart what it owned before. [Machine] is
// that state machine, one a node. It joins the replicated table (package
// membership) to the node's own blocks, pod addresses and state file (package
// ipam), and exchanges messages with the other nodes' machines.
//
// It opens no socket and reads no clock: time is passed in, messages go in and
// out as bytes through [Machine.HandleMessage] and a small [Env], so that the agent
// and the deterministic simulation (sim_test.go) run the very same code.
//
//	           cluster heard of                 first blocks opened
//	Waiting ─────────────────────▶ Joining ───────────────────────▶ Ready ──▶ Leaving ──▶ Left
//	   │ bootstrap word, no          ▲  │ no space anywhere: stays,   ▲
//	   │ member answers              │  │ says who owns how much      │
//	   └─────────────────────────────│──│─────────────────────────────┘
//	                                 │  ▼
//	state on disk ──▶ Confirming ────┴──────────────────▶ (Ready, when it still owns its blocks)
//
// Concurrency: all methods may be called from any goroutine. The Env's methods
// are called with the Machine's lock held: they must not call back, and Send and
// Broadcast must only queue.
//
// Sources: the design of Weave Net's IPAM and what went wrong with it
// (weave #1875, #3569, #3908), flannel's leases (#1289, #805).
package ownership
