package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"

	"golang.org/x/sys/unix"
)

// Client talks to the agent behind one socket. Its errors are of type *Error.
type Client struct {
	socket string
	http   http.Client
}

var _ Backend = (*Client)(nil) // every verb has its method

// NewClient returns a Client for the agent at socket ("" means DefaultSocket). It opens one connection per call.
func NewClient(socket string) *Client {
	if socket == "" {
		socket = DefaultSocket
	}
	c := &Client{socket: socket}
	c.http.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", c.socket)
		},
	}
	return c
}

// Socket returns the path of the socket.
func (c *Client) Socket() string { return c.socket }

// Status returns the data of `tulle status`.
func (c *Client) Status(ctx context.Context) (Status, error) {
	return call[Status](ctx, c, "GET", "/v1/status", nil)
}

// Peers lists the peers.
func (c *Client) Peers(ctx context.Context) ([]Peer, error) {
	return call[[]Peer](ctx, c, "GET", "/v1/peers", nil)
}

// Route returns the path of a packet to addr.
func (c *Client) Route(ctx context.Context, addr netip.Addr) (RouteAnswer, error) {
	return call[RouteAnswer](ctx, c, "GET", "/v1/route?addr="+url.QueryEscape(addr.String()), nil)
}

// Ping probes a node through every encapsulation.
func (c *Client) Ping(ctx context.Context, req PingRequest) (PingResult, error) {
	return call[PingResult](ctx, c, "POST", "/v1/ping", req)
}

// IPAM lists this node's space, blocks and allocations.
func (c *Client) IPAM(ctx context.Context) (IPAM, error) {
	return call[IPAM](ctx, c, "GET", "/v1/ipam", nil)
}

// IPAMCheck compares the allocations with the pods on the host.
func (c *Client) IPAMCheck(ctx context.Context) (IPAMCheck, error) {
	return call[IPAMCheck](ctx, c, "GET", "/v1/ipam/check", nil)
}

// IPAMRelease frees leaked addresses.
func (c *Client) IPAMRelease(ctx context.Context, req ReleaseRequest) (ReleaseResult, error) {
	return call[ReleaseResult](ctx, c, "POST", "/v1/ipam/release", req)
}

// Allocate allocates the addresses of a pod.
func (c *Client) Allocate(ctx context.Context, req AllocateRequest) (Allocation, error) {
	return call[Allocation](ctx, c, "POST", "/v1/ipam/allocate", req)
}

// Free frees the addresses of a pod.
func (c *Client) Free(ctx context.Context, req FreeRequest) (FreeResult, error) {
	return call[FreeResult](ctx, c, "POST", "/v1/ipam/free", req)
}

// Pods lists the pods of this node with their links.
func (c *Client) Pods(ctx context.Context) ([]Pod, error) {
	return call[[]Pod](ctx, c, "GET", "/v1/pods", nil)
}

// PodsOf lists the pods of one container that have an allocation. An agent of an older version lists those of all containers.
func (c *Client) PodsOf(ctx context.Context, container string) ([]Pod, error) {
	return call[[]Pod](ctx, c, "GET", "/v1/pods?container="+url.QueryEscape(container), nil)
}

// Leave gives all of this node's space to another member.
func (c *Client) Leave(ctx context.Context) (LeaveResult, error) {
	return call[LeaveResult](ctx, c, "POST", "/v1/leave", nil)
}

// Forget takes over the space of a dead node.
func (c *Client) Forget(ctx context.Context, req ForgetRequest) (ForgetResult, error) {
	return call[ForgetResult](ctx, c, "POST", "/v1/forget", req)
}

// Externals lists the external peers.
func (c *Client) Externals(ctx context.Context) ([]External, error) {
	return call[[]External](ctx, c, "GET", "/v1/external", nil)
}

// ExternalAdd gives a prefix to an external peer.
func (c *Client) ExternalAdd(ctx context.Context, req ExternalRequest) (External, error) {
	return call[External](ctx, c, "POST", "/v1/external", req)
}

// ExternalRemove takes a prefix back from an external peer.
func (c *Client) ExternalRemove(ctx context.Context, prefix netip.Prefix) (External, error) {
	return call[External](ctx, c, "DELETE", "/v1/external?prefix="+url.QueryEscape(prefix.String()), nil)
}

// Keys lists the gossip keys of all members.
func (c *Client) Keys(ctx context.Context) (KeyList, error) {
	return call[KeyList](ctx, c, "GET", "/v1/keys", nil)
}

// KeyInstall installs a new key on every member, without using it yet.
func (c *Client) KeyInstall(ctx context.Context, req KeyRequest) (KeyResult, error) {
	return call[KeyResult](ctx, c, "POST", "/v1/keys/install", req)
}

// KeyUse makes every member encrypt with an installed key.
func (c *Client) KeyUse(ctx context.Context, req KeyRequest) (KeyResult, error) {
	return call[KeyResult](ctx, c, "POST", "/v1/keys/use", req)
}

// KeyRemove removes an unused key from every member.
func (c *Client) KeyRemove(ctx context.Context, req KeyRequest) (KeyResult, error) {
	return call[KeyResult](ctx, c, "POST", "/v1/keys/remove", req)
}

// Reload makes the agent read its configuration again.
func (c *Client) Reload(ctx context.Context) (ReloadResult, error) {
	return call[ReloadResult](ctx, c, "POST", "/v1/reload", nil)
}

// LogLevel shows the level of the agent's log, or sets it until the agent restarts.
func (c *Client) LogLevel(ctx context.Context, req LogLevelRequest) (LogLevel, error) {
	return call[LogLevel](ctx, c, "POST", "/v1/log-level", req)
}

// Trace times a sample of packets in the agent. It answers when the trace has ended.
func (c *Client) Trace(ctx context.Context, req TraceRequest) (Trace, error) {
	return call[Trace](ctx, c, "POST", "/v1/trace", req)
}

// call is a function because methods have no type parameters.
func call[Resp any](ctx context.Context, c *Client, method, path string, req any) (resp Resp, err error) {
	res, err := c.open(ctx, method, path, req)
	if err != nil {
		return resp, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxResponse))
	if err != nil {
		return resp, c.explain(ctx, err)
	}
	if err := json.Unmarshal(raw, &resp); err != nil {
		return resp, Errorf(CodeFailed, "%s: the agent's answer cannot be read: %v", c.socket, err).
			WithRemedy("agent and command line are of different versions: restart the agent")
	}
	return resp, nil
}

// open sends a request and returns the answer, or the error that it is.
func (c *Client) open(ctx context.Context, method, path string, req any) (*http.Response, error) {
	var body io.Reader
	if req != nil {
		b, err := json.Marshal(req)
		if err != nil {
			return nil, Errorf(CodeUsage, "%v", err)
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://tulle"+path, body)
	if err != nil {
		return nil, Errorf(CodeUsage, "%v", err)
	}
	res, err := c.http.Do(r)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, maxResponse))
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	e := new(Error)
	if json.Unmarshal(raw, e) != nil || e.Message == "" {
		e = Errorf(CodeFailed, "%s answered %q, which is not an agent's answer", c.socket, res.Status)
	}
	return nil, e
}

// explain turns a connection failure into one line with its remedy. It wraps the failure; that an answer did not come in time is the context's error.
func (c *Client) explain(ctx context.Context, err error) error {
	e := c.explained(ctx, err)
	if e.cause = err; ctx.Err() != nil {
		e.cause = context.Cause(ctx)
	}
	return e
}

func (c *Client) explained(ctx context.Context, err error) *Error {
	switch {
	case ctx.Err() != nil:
		return Errorf(CodeNoAgent, "the agent at %s did not answer in time (%v)", c.socket, context.Cause(ctx)).
			WithRemedy("see `systemctl status tulle` and its log, or set a longer --timeout")
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return Errorf(CodeNoAgent, "no agent listens on %s", c.socket).
			WithRemedy("see `systemctl status tulle`, or name the agent's socket with --socket")
	case errors.Is(err, fs.ErrPermission):
		return Errorf(CodeNoAgent, "no permission to use %s", c.socket).WithRemedy("run as root")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET):
		return Errorf(CodeNoAgent, "the agent at %s closed the connection before it answered", c.socket).
			WithRemedy("it may be stopping or restarting: see `systemctl status tulle`")
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	return Errorf(CodeNoAgent, "%s: %v", c.socket, err).WithRemedy("is %s the socket of an agent?", c.socket)
}
