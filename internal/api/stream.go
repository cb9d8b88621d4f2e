package api

import (
	"encoding/json"
	"net/http"
	"time"
)

// stream answers with the events that run sends, a line of JSON each, as long as run lasts. An error of run is the answer if
// there was no event before it; later it ends the stream.
func stream[E any](w http.ResponseWriter, run func(send func(E) error) error) {
	control := http.NewResponseController(w)
	if err := control.SetReadDeadline(time.Time{}); err != nil { // it may last longer than a request
		fail(w, err)
		return
	}
	began := false
	err := run(func(e E) error {
		if !began {
			w.Header().Set("Content-Type", "application/x-ndjson")
			began = true
		}
		if err := json.NewEncoder(w).Encode(e); err != nil {
			return err
		}
		return control.Flush()
	})
	if err != nil && !began {
		fail(w, err)
	}
}
