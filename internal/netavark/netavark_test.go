package netavark

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/api"
)

// run does one call, and reads its answer.
func run(t *testing.T, input string, args ...string) (code int, answer map[string]any, raw string) {
	t.Helper()
	var out, warn bytes.Buffer
	code = Main(args, strings.NewReader(input), &out, &warn)
	if out.Len() > 0 {
		if err := json.Unmarshal(out.Bytes(), &answer); err != nil {
			t.Errorf("%v: %v: %s", args, err, out.Bytes())
		}
	}
	return code, answer, strings.TrimSpace(out.String())
}

func TestInfo(t *testing.T) {
	code, answer, raw := run(t, "", "info")
	if code != 0 || answer["version"] != api.Version() || answer["api_version"] != "1.0.0" {
		t.Error(code, raw)
	}
}

// podman compares name, ID and driver with what it sent, and keeps all the rest of the answer: nothing of it may be lost.
func TestCreate(t *testing.T) {
	const in = `{"name": "pods", "id": "2f25", "driver": "tulle", "created": "2026-01-01T00:00:00Z", "ipv6_enabled": true, "internal": false,
		"dns_enabled": true, "labels": {"a": "b"}, "options": {"bridge": "pods", "socket": "/run/x.sock"}, "ipam_options": {}, "later": [1]}`
	const want = `{"created":"2026-01-01T00:00:00Z","dns_enabled":false,"driver":"tulle","id":"2f25","internal":false,"ipam_options":{"driver":"none"},` +
		`"ipv6_enabled":true,"labels":{"a":"b"},"later":[1],"name":"pods","options":{"bridge":"pods","socket":"/run/x.sock"}}`
	if code, _, raw := run(t, in, "create"); code != 0 || raw != want {
		t.Errorf("%d %s", code, raw)
	}
}

// Rootless podman is told so before it makes a network, and for one that it has from elsewhere. What is not there can be torn down.
func TestRootless(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	for uid, want := range map[string]string{"1000": "podman of user 1000 is rootless", "0": "no agent listens"} {
		t.Setenv(rootlessUser, uid)
		if code, _, raw := run(t, setupInput(socket, "", ""), "setup", "/proc/self/ns/net"); code != 1 || !strings.Contains(raw, want) {
			t.Errorf("setup with user %s: %d %s, want %q", uid, code, raw, want)
		}
		code, _, raw := run(t, `{"name": "pods", "driver": "tulle"}`, "create")
		if (code == 0) != (uid == "0") || code != 0 && !strings.Contains(raw, want) {
			t.Errorf("create with user %s: %d %s", uid, code, raw)
		}
	}
}

// setupInput is the input of setup and teardown with one part exchanged.
func setupInput(socket, old, replacement string) string {
	return strings.Replace(`{"container_id": "752947ff91f961eb3cb47ffe9315016979f3ffbec09e4d96a4fae3fb03391697", "container_name": "box", "port_mappings": null,
		"network": {"name": "pods", "options": {"socket": "`+socket+`"}, "driver": "tulle"},
		"network_options": {"interface_name": "eth0", "static_ips": ["10.244.0.7"], "static_mac": "02:00:00:00:00:01", "aliases": ["x"]}}`, old, replacement, 1)
}

// What cannot be done is an error with its reason, and exit code 1.
func TestErrors(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "none.sock")
	for _, c := range []struct {
		args        []string
		input, want string
	}{
		{[]string{"create"}, ``, "unexpected end"},
		{[]string{"create"}, `[]`, "array"},
		{[]string{"create"}, `{"internal": true}`, "--internal"},
		{[]string{"create"}, `{"subnets": [{"subnet": "192.0.2.0/24"}]}`, "--subnet 192.0.2.0/24"},
		{[]string{"create"}, `{"ipam_options": {"driver": "dhcp"}}`, "--ipam-driver dhcp"},
		{[]string{"create"}, `{"network_interface": "br0"}`, "--interface-name br0"},
		{[]string{"create"}, `{"routes": [{}]}`, "--route"},
		{[]string{"create"}, `{"options": {"mtu": "9000"}}`, "--opt mtu=9000"},
		{[]string{"create"}, `{"options": {"mtu": "9000"}}`, "options socket (the path of the agent's socket) and bridge"},
		{[]string{"create"}, `{"options": {"socket": "tulle.sock"}}`, "absolute"},
		{[]string{"create"}, `{"options": {"bridge": ""}}`, `--opt bridge=: interface name ""`},
		{[]string{"create"}, `{"options": {"bridge": "a/b"}}`, "--opt bridge=a/b"},
		{[]string{"create"}, `{"options": {"bridge": "sixteen-letters-"}}`, "1 to 15 bytes"},
		{[]string{"create"}, `{"network_interface": "br0"}`, "--opt bridge=NAME"},
		{[]string{"create"}, `{"name": "` + strings.Repeat("x", maxInput) + `"}`, "longer"},
		{[]string{"setup"}, ``, "path"},
		{[]string{"setup", "/proc/self/ns/net"}, `{}`, "want a name"},
		{[]string{"setup", "/proc/self/ns/net"}, setupInput(socket, `"pods"`, `"a/b"`), `"a/b"`},
		{[]string{"setup", "/proc/self/ns/net"}, setupInput(socket, "02:00:00:00:00:01", "02:00"), "--mac-address"},
		{[]string{"setup", "/proc/self/ns/net"}, setupInput(socket, "10.244.0.7", "10.244"), "10.244"},
		{[]string{"setup", "/proc/self/ns/net"}, setupInput(socket, `"aliases"`, `"options": {"a": "b"}, "aliases"`), "a=b"},
		{[]string{"setup", "/proc/self/ns/net"}, setupInput(socket, `"socket"`, `"bridge": "a b", "socket"`), "--opt bridge=a b"},
		{[]string{"setup", "/proc/self/ns/net"}, setupInput(socket, "", ""), "no agent listens"},
		{[]string{"teardown", "/nowhere"}, `{`, "unexpected end"},
	} {
		code, answer, raw := run(t, c.input, c.args...)
		if text, _ := answer["error"].(string); code != 1 || !strings.HasPrefix(text, "tulle: ") || !strings.Contains(text, c.want) {
			t.Errorf("%v %.200s: %d %s, want an error with %q", c.args, c.input, code, raw, c.want)
		}
	}
}

// The ID is what teardown finds the interface by, and what `podman ps` shows.
func TestRequest(t *testing.T) {
	var c call
	input := strings.Replace(setupInput("/x.sock", "10.244.0.7", `::ffff:10.244.0.7", "fd00::7`), `"socket"`, `"bridge": "pods", "socket"`, 1)
	if err := decode(strings.NewReader(input), &c); err != nil {
		t.Fatal(err)
	}
	r, err := c.request()
	var requested []string
	for _, a := range r.Requested {
		requested = append(requested, a.String())
	}
	if err != nil || r.ID.String() != "podman/pods/752947ff91f9/eth0" || r.Name != "box" || r.Socket != "/x.sock" || r.Bridge != "pods" || r.MAC.String() != "02:00:00:00:00:01" ||
		!slices.Equal(requested, []string{"10.244.0.7", "fd00::7"}) {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestIsCall(t *testing.T) {
	for _, c := range []struct {
		args []string
		want bool
	}{{nil, false}, {[]string{"--version"}, false}, {[]string{"setup", "/x"}, true}, {[]string{"info"}, true}, {[]string{"ADD"}, false}} {
		if got := IsCall(c.args); got != c.want {
			t.Errorf("%q: %v", c.args, got)
		}
	}
}

// FuzzInput: no input makes the plugin panic, an accepted network keeps its name, ID and driver, and the ID of a container reads back.
func FuzzInput(f *testing.F) {
	f.Add(`{"name": "pods", "id": "2f25", "driver": "tulle", "options": null}`)
	f.Add(setupInput("/x.sock", "", ""))
	f.Fuzz(func(t *testing.T, input string) {
		var before, after map[string]any
		out, err := create(strings.NewReader(input))
		if err == nil {
			b, err := json.Marshal(out)
			if err != nil {
				t.Fatal(err)
			}
			_ = json.Unmarshal([]byte(input), &before)
			_ = json.Unmarshal(b, &after)
			for _, key := range []string{"name", "id", "driver"} {
				x, _ := json.Marshal(before[key])
				y, _ := json.Marshal(after[key])
				if !bytes.Equal(x, y) {
					t.Errorf("%s was %s, is %s", key, x, y)
				}
			}
		}
		var c call
		if decode(strings.NewReader(input), &c) != nil {
			return
		}
		r, err := c.request()
		if err != nil {
			return
		}
		if id, ok := api.ParsePodID(r.ID.String()); !ok || id != r.ID || len(r.Name) > api.MaxNameLen {
			t.Errorf("%+v reads back as %+v", r, id)
		}
	})
}
