package soak

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/testing/hosts"
)

// size is what an agent holds.
type size struct{ goroutines, files, resident int }

// sizes asks all agents.
func (c *cluster) sizes() (out []size) {
	c.t.Helper()
	for _, m := range c.machines {
		var s size
		hosts.Within(c.t, 10*time.Second, "metrics of "+m.Name, func() (err error) { s, err = m.size(); return })
		out = append(out, s)
	}
	return out
}

func (m *machine) size() (s size, err error) {
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, Dial: func(network, addr string) (c net.Conn, err error) {
		err = m.Do(func() error { c, err = net.Dial(network, addr); return err })
		return c, err
	}}}
	res, err := client.Get("http://127.0.0.1:9646/metrics")
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	into := map[string]*int{"go_goroutines": &s.goroutines, "process_open_fds": &s.files, "process_resident_memory_bytes": &s.resident}
	found := 0
	for sc := bufio.NewScanner(res.Body); sc.Scan(); {
		name, value, _ := strings.Cut(sc.Text(), " ")
		if p := into[name]; p != nil {
			v, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return s, err
			}
			*p = int(v)
			found++
		}
	}
	if found != len(into) {
		return s, fmt.Errorf("%d of %d metrics", found, len(into))
	}
	return s, nil
}

// settled is what agents hold at the end. It fails the test if one holds more than at the start, also after what ends by itself
// has had time to end.
func (c *cluster) settled(before []size) (now []size) {
	c.t.Helper()
	const moreGoroutines, moreFiles, moreMemory = 30, 20, 48 << 20
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		err, now = nil, c.sizes()
		for i, n := range now {
			b := before[i]
			if n.goroutines > b.goroutines+moreGoroutines || n.files > b.files+moreFiles || n.resident > b.resident+moreMemory {
				err = fmt.Errorf("the agent of %s has grown: goroutines %d, was %d; open files %d, was %d; resident bytes %d, was %d",
					c.machines[i].Name, n.goroutines, b.goroutines, n.files, b.files, n.resident, b.resident)
			}
		}
		if err == nil {
			return now
		}
	}
	c.t.Error(err)
	return now
}
