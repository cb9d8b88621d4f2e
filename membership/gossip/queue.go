package gossip

import "github.com/hashicorp/memberlist"

// broadcast is one message in the queue. It is opaque and replaces no other.
type broadcast []byte

var _ memberlist.UniqueBroadcast = broadcast(nil)

func (b broadcast) Invalidates(memberlist.Broadcast) bool { return false }
func (b broadcast) Message() []byte                       { return b }
func (b broadcast) Finished()                             {}
func (b broadcast) UniqueBroadcast()                      {}

// maxQueued is the maximum number of queued broadcasts.
const maxQueued = 8192

// queue has the broadcasts that are still to be sent. It is never empty, because memberlist's queue begins to number its messages anew
// when it is (memberlist 0.7.0, queue.go, deleteItem). That happens also while GetBroadcasts has the only message in its hands, which then
// returns to the queue with its old number: after as many transmissions a newer message of the same length comes to have the same key,
// and takes its place. So the queue begins with a message that never leaves it. It is longer than any packet, so that it is never sent,
// and first in the order of the queue (least transmissions, then longest), from whose end Prune drops.
type queue struct {
	q    memberlist.TransmitLimitedQueue
	fits int // the largest message, in bytes
}

func newQueue(nodes func() int, fits int) *queue {
	q := &queue{q: memberlist.TransmitLimitedQueue{NumNodes: nodes, RetransmitMult: retransmitMult}, fits: fits}
	q.q.QueueBroadcast(broadcast(make([]byte, maxGossipPacket+1)))
	return q
}

// add queues an enveloped message. If the queue is full, it drops the message that was sent most often. It does not take a message that fits no
// packet, which came from a member with a larger MTU and would stay for ever. Push/pull delivers both to members that missed them.
func (q *queue) add(wire []byte) {
	if len(wire) > q.fits {
		return
	}
	q.q.QueueBroadcast(broadcast(wire))
	if q.len() > maxQueued {
		q.q.Prune(maxQueued + 1)
	}
}

// take returns what is to be sent in one packet.
func (q *queue) take(overhead, limit int) [][]byte { return q.q.GetBroadcasts(overhead, limit) }

// len is the number of messages that are still to be sent.
func (q *queue) len() int { return q.q.NumQueued() - 1 }
