package main

import (
	"bufio"
	"os"
	"strings"
	"testing"
	"time"
)

// A reader of the log that stops reading holds nobody up for longer than once for a second. When it reads again, it finds whole lines, and how many it has missed.
func TestLogReaderStops(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close()
			log := newLogger(w, loadConfig(t, "--node-name", "a", "--log-format", format))
			const lines = 2000 // with their padding far more than a pipe holds
			wrote := make(chan struct{})
			go func() { // ends at the latest when the pipe is closed
				defer close(wrote)
				for i := range lines {
					log.Info("line", "padding", strings.Repeat("x", i%5*1000))
				}
			}()
			select {
			case <-wrote:
			case <-time.After(time.Minute):
				t.Fatal("the log waits for its reader")
			}

			back := make(chan struct{})
			go func() { // ends with the reader below
				defer w.Close()
				for {
					select {
					case <-back:
						return
					case <-time.After(10 * time.Millisecond):
						log.Info("again")
					}
				}
			}()
			seen, told, again, torn := 0, "", false, 0
			in := bufio.NewScanner(r)
			in.Buffer(nil, 1<<20)
			for in.Scan() {
				switch text := in.Text(); {
				case strings.Contains(text, "lines of the log are lost"):
					told = text
				case strings.Contains(text, "again"):
					if !again {
						close(back)
					}
					again = true
				case strings.HasSuffix(text, "xxx") || strings.HasSuffix(text, "padding=\"\"") || strings.HasSuffix(text, `"}`):
					seen++
				default:
					torn++
				}
			}
			if seen == 0 || seen == lines || told == "" || !again || torn > 1 {
				t.Errorf("%d of %d lines read, %d torn, what was lost was told as %q, later lines came: %v", seen, lines, torn, told, again)
			}
		})
	}
}
