package api

import (
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// No request makes the server panic (a panic would be answered as CodeFailed with "the agent failed on"), and whatever
// reaches the backend has passed its checks.
func FuzzRequest(f *testing.F) {
	for _, path := range []string{"/v1/ping", "/v1/ipam/allocate", "/v1/external", "/v1/keys/install", "/v1/forget", "/v1/ipam/release", "/v1/bench"} {
		f.Add("POST", path, `{"node":"a","count":3}`)
		f.Add("POST", path, `{"id":"a","requested":["10.0.0.1","fd00::1"]}`)
	}
	f.Add("GET", "/v1/route?addr=10.0.0.1", "")
	f.Add("DELETE", "/v1/external?prefix=10.0.0.0/8", "")
	f.Add("POST", "/v1/external", `{"prefix":"10.0.0.0/24","endpoint":"192.0.2.1","encapsulation":"ipip"}`)
	f.Fuzz(func(t *testing.T, method, path, body string) {
		if u, err := url.ParseRequestURI(path); err != nil || u.Host != "" || !strings.HasPrefix(path, "/") {
			return
		}
		switch method {
		case "GET", "POST", "DELETE", "PUT":
		default:
			return
		}
		e := new(echo)
		r := httptest.NewRequest(method, "/", strings.NewReader(body))
		r.URL, _ = url.ParseRequestURI(path)
		w := httptest.NewRecorder()
		NewServer(e, quiet).ServeHTTP(w, r)
		if strings.Contains(w.Body.String(), "the agent failed on") {
			t.Errorf("%s %q %q: %s", method, path, body, w.Body)
		}
		if v, ok := e.got.(interface{ validate() error }); ok && v.validate() != nil {
			t.Errorf("%s %q reached the backend: %+v", path, body, e.got)
		}
	})
}
