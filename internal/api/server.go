package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"runtime/debug"
	"sync"
	"time"
)

const (
	maxRequest      = 64 << 10        // bytes of a request's body
	maxResponse     = 64 << 20        // bytes of an answer that Client reads: 1,000 peers take below 2 MiB
	headerTimeout   = 5 * time.Second // for a client that connects and sends nothing
	shutdownTimeout = 2 * time.Second // for requests in progress when the agent stops
)

// Server serves a Backend on the control socket.
type Server struct {
	backend Backend
	log     *slog.Logger
	mux     *http.ServeMux
	calls   sync.WaitGroup
}

// NewServer returns a Server. Call Serve to start it.
func NewServer(b Backend, log *slog.Logger) *Server {
	s := &Server{backend: b, log: log, mux: http.NewServeMux()}

	get(s, "GET /v1/status", b.Status)
	get(s, "GET /v1/peers", b.Peers)
	s.mux.HandleFunc("GET /v1/route", func(w http.ResponseWriter, r *http.Request) {
		text := r.URL.Query().Get("addr")
		addr, err := netip.ParseAddr(text)
		if err != nil || addr.Zone() != "" {
			fail(w, usage("address %q is not an IPv4 or IPv6 address", text))
			return
		}
		answer(s, w, r, func(ctx context.Context) (RouteAnswer, error) { return b.Route(ctx, addr.Unmap()) })
	})
	post(s, "POST /v1/ping", PingRequest.validate, b.Ping)

	get(s, "GET /v1/ipam", b.IPAM)
	get(s, "GET /v1/ipam/check", b.IPAMCheck)
	post(s, "POST /v1/ipam/release", ReleaseRequest.validate, b.IPAMRelease)
	post(s, "POST /v1/ipam/allocate", AllocateRequest.validate, b.Allocate)
	post(s, "POST /v1/ipam/free", FreeRequest.validate, b.Free)
	s.mux.HandleFunc("GET /v1/pods", func(w http.ResponseWriter, r *http.Request) {
		answer(s, w, r, func(ctx context.Context) ([]Pod, error) {
			if container := r.URL.Query().Get("container"); container != "" {
				return b.PodsOf(ctx, container)
			}
			return b.Pods(ctx)
		})
	})

	get(s, "POST /v1/leave", b.Leave)
	post(s, "POST /v1/forget", ForgetRequest.validate, b.Forget)

	get(s, "GET /v1/external", b.Externals)
	post(s, "POST /v1/external", ExternalRequest.validate, b.ExternalAdd)
	s.mux.HandleFunc("DELETE /v1/external", func(w http.ResponseWriter, r *http.Request) {
		text := r.URL.Query().Get("prefix")
		prefix, err := netip.ParsePrefix(text)
		if err == nil {
			err = checkPrefix(prefix)
		} else {
			err = usage("prefix %q is not a CIDR prefix such as 10.244.7.0/24", text)
		}
		if err != nil {
			fail(w, err)
			return
		}
		answer(s, w, r, func(ctx context.Context) (External, error) { return b.ExternalRemove(ctx, prefix) })
	})

	get(s, "GET /v1/keys", b.Keys)
	post(s, "POST /v1/keys/install", KeyRequest.validateInstall, b.KeyInstall)
	post(s, "POST /v1/keys/use", KeyRequest.validateID, b.KeyUse)
	post(s, "POST /v1/keys/remove", KeyRequest.validateID, b.KeyRemove)

	get(s, "POST /v1/reload", b.Reload)
	post(s, "POST /v1/log-level", LogLevelRequest.validate, b.LogLevel)
	s.mux.HandleFunc("POST /v1/capture", s.capture)
	post(s, "POST /v1/trace", TraceRequest.validate, b.Trace)
	s.mux.HandleFunc("POST /v1/bench", s.bench)

	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, Errorf(CodeNotFound, "%s", unknownCall(r.Method, r.URL.Path)).
			WithRemedy("agent and command line are of different versions: restart the agent"))
	})
	return s
}

// unknownCall is the message of an agent of another version.
func unknownCall(method, path string) string {
	return fmt.Sprintf("this agent does not know %s %s", method, path)
}

// Serve answers requests on l until ctx ends. It then closes l, and returns nil when the last request has been answered or
// aborted. It returns an error if it stops before ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	err := Serve(ctx, l, s, s.log)
	s.calls.Wait()
	return err
}

// Serve is the Server's Serve for another handler on a socket of its own. It does not wait for requests that it has aborted.
func Serve(ctx context.Context, l net.Listener, handler http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       2 * headerTimeout,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// Shutdown's own deadline must outlive ctx, which has ended.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(l)
	if stop() { // ctx is alive: Serve ended by itself
		srv.Close()
	} else {
		<-stopped
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("socket %s: %w", l.Addr(), err)
}

// ServeHTTP answers one request. A panic in the backend fails only that request; its stack is logged.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.calls.Add(1)
	defer s.calls.Done()
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("request panicked", "method", r.Method, "path", r.URL.Path, "error", p, "stack", string(debug.Stack()))
			fail(w, Errorf(CodeFailed, "the agent failed on %s %s: %v", r.Method, r.URL.Path, p).
				WithRemedy("please report it with the agent's log"))
		}
	}()
	r.Body = http.MaxBytesReader(w, r.Body, maxRequest)
	s.mux.ServeHTTP(w, r)
}

// get registers a request without a body.
func get[Resp any](s *Server, pattern string, call func(context.Context) (Resp, error)) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { answer(s, w, r, call) })
}

// post registers a request with a body of type Req.
func post[Req, Resp any](s *Server, pattern string, validate func(Req) error, call func(context.Context, Req) (Resp, error)) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		var req Req
		err := decode(r.Body, &req)
		if err == nil {
			err = validate(req)
		}
		if err != nil {
			fail(w, err)
			return
		}
		answer(s, w, r, func(ctx context.Context) (Resp, error) { return call(ctx, req) })
	})
}

func decode(body io.Reader, to any) error {
	dec := json.NewDecoder(body)
	dec.DisallowUnknownFields() // do not silently ignore an option that is not known
	err := dec.Decode(to)
	if err == nil {
		if _, err = dec.Token(); err == io.EOF {
			return nil
		}
		err = errors.New("more than one JSON value")
	}
	if big, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return usage("request body is larger than %d bytes", big.Limit)
	}
	return usage("request body: %v", err)
}

func answer[Resp any](s *Server, w http.ResponseWriter, r *http.Request, call func(context.Context) (Resp, error)) {
	resp, err := call(r.Context())
	if err != nil {
		s.log.Debug("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
		fail(w, err)
		return
	}
	if r.Method != http.MethodGet {
		s.log.Debug("request done", "method", r.Method, "path", r.URL.Path)
	}
	fillSlices(reflect.ValueOf(&resp).Elem())
	now := time.Now()
	onWallClock(reflect.ValueOf(&resp).Elem(), now, now.Round(0))
	write(w, http.StatusOK, resp)
}

func fail(w http.ResponseWriter, err error) {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		e = &Error{Code: CodeFailed, Message: err.Error()}
	} else if wrapped := err.Error(); wrapped != e.Error() {
		// The coded error is wrapped: keep the whole text and the code.
		e = &Error{Code: e.Code, Message: wrapped}
	}
	write(w, e.Code.httpStatus(), e)
}

func write(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // a NaN from the backend
		status = http.StatusInternalServerError
		b, _ = json.Marshal(Errorf(CodeFailed, "the agent cannot write its answer: %v", err))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

// fillSlices replaces nil slices and maps by empty ones, so that JSON has [] instead of null: scripts iterate over them.
// It skips byte slices and types with their own JSON encoding.
func fillSlices(v reflect.Value) {
	if _, own := v.Interface().(json.Marshaler); own {
		return
	}
	switch v.Kind() {
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return
		}
		if v.IsNil() {
			v.Set(reflect.MakeSlice(v.Type(), 0, 0))
		}
		for i := range v.Len() {
			fillSlices(v.Index(i))
		}
	case reflect.Map:
		if v.IsNil() {
			v.Set(reflect.MakeMap(v.Type()))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				fillSlices(v.Field(i))
			}
		}
	}
}

// onWallClock replaces times of this process by what the wall clock would have said if it had always gone as it does now. It may have been set since
// (a host boots with a wrong clock, and NTP corrects it later), and who reads them compares them with the clock of now. Times without a
// reading of the monotonic clock, such as those from files, stay. wall is what the wall clock says at now.
func onWallClock(v reflect.Value, now, wall time.Time) {
	switch v.Kind() {
	case reflect.Slice:
		for i := range v.Len() {
			onWallClock(v.Index(i), now, wall)
		}
	case reflect.Struct:
		if t, ok := v.Interface().(time.Time); ok {
			if t != t.Round(0) { // it has a reading of the monotonic clock
				set := wall.Sub(t.Round(0)) - now.Sub(t)
				v.Set(reflect.ValueOf(t.Round(0).Add(set.Round(time.Second)))) // the same one in each answer: the two clocks are not read at once
			}
			return
		}
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				onWallClock(v.Field(i), now, wall)
			}
		}
	}
}
