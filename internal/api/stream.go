package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
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

// events asks for a stream and calls each with its events until ctx ends (nil), or each returns an error, which events then returns. An agent that
// ends the stream is the error ended.
func events[E any](ctx context.Context, c *Client, path string, req any, ended *Error, each func(E) error) error {
	res, err := c.open(ctx, "POST", path, req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	dec := json.NewDecoder(bufio.NewReader(res.Body))
	for {
		var e E
		switch err := dec.Decode(&e); {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, io.EOF):
			return ended
		case err != nil:
			return c.explain(ctx, err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
}
