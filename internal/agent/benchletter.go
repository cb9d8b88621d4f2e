package agent

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// benchLetter is a message between two agents about a benchmark. It travels as a message of gossip: the byte benchTag, which
// no message about address space begins with, then JSON.
type benchLetter struct {
	Kind string `json:"kind"` // of letterAsk and so on
	ID   string `json:"id"`   // of the benchmark; the asking agent makes it up
	Six  bool   `json:"six,omitempty"`
	// Ways are those that are asked for with the asker's addresses, or those that are granted with the answerer's.
	Ways   []letterWay   `json:"ways,omitempty"`
	Token  string        `json:"token,omitempty"`
	Mbps   int           `json:"mbps,omitempty"`
	Left   time.Duration `json:"left,omitempty"` // nanoseconds until the answerer ends it
	Error  string        `json:"error,omitempty"`
	Remedy string        `json:"remedy,omitempty"`
}

// letterWay is one way: the sender's address of it, or why it has none.
type letterWay struct {
	Mode    string     `json:"mode"`
	Addr    netip.Addr `json:"addr,omitzero"`
	Port    uint16     `json:"port,omitempty"`
	MTU     int        `json:"mtu,omitempty"`
	Missing string     `json:"missing,omitempty"`
}

// The kinds of letters. An agent that is asked answers; the asking one then says every few seconds that it goes on, until it
// or the other ends it.
const (
	letterAsk    = "ask"
	letterAnswer = "answer"
	letterGoOn   = "go on"
	letterEnd    = "end"
)

const (
	benchTag       = 'B'
	maxLetter      = 8 << 10 // bytes
	benchIDLen     = 32      // digits
	maxLetterText  = 512     // bytes of each text
	maxLetterToken = 64
)

func (l *benchLetter) encode() ([]byte, error) {
	b, err := json.Marshal(l)
	return append([]byte{benchTag}, b...), err
}

// parseLetter reads what follows the tag. It comes from another host: nothing in it is believed further than is checked here.
func parseLetter(b []byte) (*benchLetter, error) {
	if len(b) > maxLetter {
		return nil, fmt.Errorf("a message of %d bytes about a benchmark: the limit is %d", len(b), maxLetter)
	}
	l := new(benchLetter)
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("message about a benchmark: %w", err)
	}
	if len(l.ID) != benchIDLen || len(l.Ways) > len(api.BenchModes) || len(l.Token) > maxLetterToken || len(l.Error) > maxLetterText || len(l.Remedy) > maxLetterText || l.Mbps < 0 {
		return nil, fmt.Errorf("message about a benchmark: kind %.20q with %d ways, an ID of %d digits", l.Kind, len(l.Ways), len(l.ID))
	}
	for i, w := range l.Ways {
		same := func(o letterWay) bool { return o.Mode == w.Mode }
		if !slices.Contains(api.BenchModes, w.Mode) || slices.ContainsFunc(l.Ways[:i], same) || len(w.Missing) > maxLetterText || w.Addr.Zone() != "" || w.Addr.Is4In6() {
			return nil, fmt.Errorf("message about a benchmark: way %d, %.20q to %v", i, w.Mode, w.Addr)
		}
	}
	return l, nil
}

// cut shortens a text to what a letter may have.
func cut(s string) string { return s[:min(len(s), maxLetterText)] }
