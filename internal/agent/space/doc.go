// Package space is a node's whole address-space state machine: it wires the
// replicated table (package membership) to the node's own blocks, pod addresses
// and state file (package ipam), and speaks with the other nodes' machines about
// who owns what.
//
// It opens no socket and reads no clock: time is passed in, messages go in and
// out as bytes through [Space.HandleMessage] and a small [Env], so that the agent
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
// are called with the Space's lock held: they must not call back, and Send and
// Broadcast must only queue.
//
// Sources: the design of Weave Net's IPAM and what went wrong with it
// (weave #1875, #3569, #3908), flannel's leases (#1289, #805).
package space
