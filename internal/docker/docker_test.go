package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// call sends what the engine would send to a driver whose agent does not answer.
func call(t *testing.T, d *Driver, path, body string) (status int, answer map[string]any) {
	t.Helper()
	w := httptest.NewRecorder()
	d.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, strings.NewReader(body)))
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
		t.Errorf("%s: %v: %s", path, err, w.Body.Bytes())
	}
	return w.Code, answer
}

func lonely(t *testing.T) *Driver {
	return New(filepath.Join(t.TempDir(), "none.sock"), slog.New(slog.NewTextHandler(io.Discard, nil)))
}

// Nothing of this needs an agent.
func TestAnsweredAtOnce(t *testing.T) {
	d := lonely(t)
	for path, want := range map[string]string{
		"/Plugin.Activate":                          `{"Implements":["NetworkDriver","IpamDriver"]}`,
		"/NetworkDriver.GetCapabilities":            `{"ConnectivityScope":"global","Scope":"local"}`,
		"/IpamDriver.GetCapabilities":               `{"RequiresMACAddress":true,"RequiresRequestReplay":false}`,
		"/IpamDriver.GetDefaultAddressSpaces":       `{"GlobalDefaultAddressSpace":"tulle","LocalDefaultAddressSpace":"tulle"}`,
		"/NetworkDriver.Leave":                      `{}`,
		"/NetworkDriver.DeleteNetwork":              `{}`,
		"/NetworkDriver.DiscoverNew":                `{}`,
		"/IpamDriver.ReleasePool":                   `{}`,
		"/NetworkDriver.EndpointOperInfo":           `{"Value":{}}`,
		"/NetworkDriver.AllocateNetwork":            `{}`,
		"/NetworkDriver.RevokeExternalConnectivity": `{}`,
	} {
		code, answer := call(t, d, path, "")
		if got, _ := json.Marshal(answer); code != http.StatusOK || string(got) != want {
			t.Errorf("%s: %d %s, want %s", path, code, got, want)
		}
	}
}

// What cannot be done is an error with its reason, whatever was sent.
func TestErrors(t *testing.T) {
	d := lonely(t)
	const ours = `"IPv4Data": [{"AddressSpace": "tulle", "Pool": "10.244.0.0/16"}]`
	const endpoint = `"NetworkID": "aaaaaaaaaaaaaaaa", "EndpointID": "bbbbbbbbbbbbbbbb"`
	for _, c := range []struct{ path, body, want string }{
		{"/NetworkDriver.CreateNetwork", `{"IPv4Data": [{"AddressSpace": "LocalDefault", "Pool": "172.18.0.0/16"}]}`, "--ipam-driver tulle"},
		{"/NetworkDriver.CreateNetwork", `{` + ours + `, "Options": {"com.docker.network.internal": true}}`, "--internal"},
		{"/NetworkDriver.CreateNetwork", `{` + ours + `, "Options": {"com.docker.network.generic": {"mtu": "9000"}}}`, "mtu"},
		{"/NetworkDriver.CreateNetwork", `{"IPv4Data": 7}`, "json"},
		{"/NetworkDriver.CreateNetwork", `{`, "unexpected EOF"},
		{"/NetworkDriver.CreateEndpoint", `{"NetworkID": "a/b", "EndpointID": ""}`, "want IDs"},
		{"/NetworkDriver.CreateEndpoint", `{` + endpoint + `}`, "MAC address"},
		{"/NetworkDriver.CreateEndpoint", `{` + endpoint + `, "Interface": {"MacAddress": "02:00:00:00:00:01", "Address": "10.244.0.300/32"}}`, "10.244.0.300"},
		{"/NetworkDriver.CreateEndpoint", `{` + endpoint + `, "Interface": {"MacAddress": "02:00:00:00:00:01", "Address": "10.244.0.3/32"}}`, "no agent listens"},
		{"/NetworkDriver.DeleteEndpoint", `{}`, "want IDs"},
		{"/NetworkDriver.Join", `{` + endpoint + `}`, "start the container again"},
		{"/IpamDriver.RequestPool", `{}`, "no agent listens"},
		{"/IpamDriver.RequestAddress", `{"PoolID": "x"}`, "none of this driver"},
		{"/IpamDriver.RequestAddress", `{"PoolID": "10.244.0.0/16", "Address": "10.244.0.1"}`, "--gateway"},
		{"/IpamDriver.RequestAddress", `{"PoolID": "10.244.0.0/16", "Address": "x", "Options": {"com.docker.network.endpoint.macaddress": "02:00:00:00:00:01"}}`, `--ip "x"`},
		{"/IpamDriver.RequestAddress", `{"PoolID": "10.244.0.0/16", "Options": {"com.docker.network.endpoint.macaddress": "02:00:00:00:00:01"}}`, "no agent listens"},
		{"/IpamDriver.ReleaseAddress", `{"Address": "x"}`, `"x"`},
		{"/IpamDriver.ReleaseAddress", `{"Address": "10.244.0.3/32"}`, "no agent listens"},
	} {
		code, answer := call(t, d, c.path, c.body)
		if text, _ := answer["Err"].(string); code != http.StatusInternalServerError || !strings.Contains(text, c.want) {
			t.Errorf("%s %s: %d %v, want an error with %q", c.path, c.body, code, answer, c.want)
		}
	}
}

// A container may be in networks of other drivers, whose gateway the engine may take: other pods have routes of their own.
func TestJoinRoutes(t *testing.T) {
	d := lonely(t)
	d.endpoints["one"] = &endpoint{link: "tq1", addrs: []netip.Addr{netip.MustParseAddr("10.244.0.3")},
		space: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:244::/48")}}
	_, answer := call(t, d, "/NetworkDriver.Join", `{"EndpointID": "one", "SandboxKey": "/run/docker/netns/x"}`)
	const want = `[{"Destination":"169.254.1.1/32","NextHop":"","RouteType":1},{"Destination":"10.244.0.0/16","NextHop":"169.254.1.1","RouteType":0}]`
	if got, _ := json.Marshal(answer["StaticRoutes"]); string(got) != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A container has one network of this driver; the same sandbox may join again after it has left.
func TestJoin(t *testing.T) {
	d := lonely(t)
	d.endpoints["one"] = &endpoint{link: "tq1"}
	d.endpoints["two"] = &endpoint{link: "tq2"}
	join := func(id string) (int, map[string]any) {
		return call(t, d, "/NetworkDriver.Join", `{"NetworkID": "0123456789abcdef", "EndpointID": "`+id+`", "SandboxKey": "/run/docker/netns/x"}`)
	}
	if code, answer := join("one"); code != http.StatusOK || answer["DisableGatewayService"] != true {
		t.Error(code, answer)
	}
	if code, answer := join("two"); code != http.StatusInternalServerError || !strings.Contains(fmt.Sprint(answer["Err"]), "docker network disconnect 0123456789ab CONTAINER") {
		t.Error(code, answer)
	}
	call(t, d, "/NetworkDriver.Leave", `{"EndpointID": "one"}`)
	if code, answer := join("two"); code != http.StatusOK {
		t.Error(code, answer)
	}
}

// FuzzCall: no call makes the driver panic, and each answer is JSON.
func FuzzCall(f *testing.F) {
	f.Add("/IpamDriver.RequestAddress", `{"PoolID": "10.244.0.0/16", "Address": "10.244.0.1"}`)
	f.Add("/NetworkDriver.CreateEndpoint", `{"NetworkID": "aaaaaaaaaaaaaaaa", "EndpointID": "bbbbbbbbbbbbbbbb", "Interface": {"MacAddress": "02:00:00:00:00:01"}}`)
	f.Add("/NetworkDriver.CreateNetwork", `{"Options": {"com.docker.network.generic": {"mtu": "9000"}}}`)
	d := New("/nowhere/none.sock", slog.New(slog.NewTextHandler(io.Discard, nil)))
	f.Fuzz(func(t *testing.T, path, body string) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		w := httptest.NewRecorder()
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", strings.NewReader(body))
		r.URL.Path = path
		d.ServeHTTP(w, r)
		if w.Header().Get("Content-Type") == mediaType && !json.Valid(bytes.TrimSpace(w.Body.Bytes())) {
			t.Errorf("%s %q: %q", path, body, w.Body.Bytes())
		}
	})
}
