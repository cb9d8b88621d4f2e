package result

import (
	"bytes"
	"testing"
	"time"
)

// A stored run may be anybody's file. Reading one never panics, and what was read can be shown in every form, compared with
// itself without a difference, and read again.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"format":"tulle-bench","version":1,"kind":"pair","modes":[{"name":"net","rounds":[{"tcp":[{"streams":1,"bytes":1000000000,"seconds":1,"gbps":8}],` +
		`"latency":[{"kind":"ping-pong","payload":64,"seconds":1,"answers":3,"times":null}],"udp":[{"payload":64,"best":{"sent":1,"received":1,"seconds":1}}],` +
		`"floods":[{"flows":1,"payload":1400,"trial":{"sent":2,"received":1,"seconds":0}}],"rss_bytes":1}]}]}`))
	f.Add([]byte(`{"format":"tulle-bench","version":1,"kind":"lab","references":["a"],"targets":[{"mode":"b","to":"a","metric":"tcp1_gbps"}],"modes":[{"name":"a","rounds":[{},{},{},{},{}]},{"name":"b","missing":"x"}]}`))
	f.Add([]byte(`{"format":"tulle-bench","version":2}`))
	f.Add([]byte(`[`))
	h := NewHistogram()
	h.Record(1500 * time.Microsecond)
	if text, err := h.MarshalJSON(); err == nil {
		f.Add([]byte(`{"format":"tulle-bench","version":1,"kind":"pair","modes":[{"name":"p","rounds":[{"latency":[{"kind":"tcp-rr","payload":64,"seconds":1,"answers":1,"times":` + string(text) + `}]}]}]}`))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Read(bytes.NewReader(b))
		if err != nil {
			return
		}
		var again bytes.Buffer
		for _, write := range []func() error{
			func() error { return r.Print(&bytes.Buffer{}, true) }, func() error { return r.Print(&bytes.Buffer{}, false) },
			func() error { return r.WriteCSV(&bytes.Buffer{}) }, func() error { return r.WriteMarkdown(&bytes.Buffer{}) },
		} {
			_ = write() // it may refuse what makes no sense
		}
		if d, err := Compare(r, r, 0.03); err == nil && d.Regressed() {
			t.Error("a run got worse than itself")
		}
		if r.WriteJSON(&again) != nil {
			return // a value that JSON has no form for
		}
		if _, err := Read(&again); err != nil {
			t.Errorf("what was written is not read: %v", err)
		}
	})
}
