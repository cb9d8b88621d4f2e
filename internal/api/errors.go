package api

import (
	"errors"
	"fmt"
	"net/http"
)

// Code is the kind of a failure. It determines the exit code of the command line.
type Code string

// The codes. CodeUsage gives exit code 2, all others 1.
const (
	CodeUsage     Code = "usage"     // an invalid request: a bad address, an unknown encapsulation
	CodeNotFound  Code = "not_found" // no such node, address, key
	CodeRefused   Code = "refused"   // not allowed: forget of a live node, release of an address in use
	CodeUnhealthy Code = "unhealthy" // not possible now: isolated, no space, not ready
	CodeNoAgent   Code = "no_agent"  // no agent answers on the socket (set by Client, never sent)
	CodeFailed    Code = "failed"    // anything else
)

// Error is a failure with its code and, if known, its remedy.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`

	cause error // of CodeNoAgent; stays on this side
}

// Error returns one line: the failure, then the remedy.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + "; " + e.Remedy
}

// Unwrap returns what failed on the way to the agent, nil if the agent has answered.
func (e *Error) Unwrap() error { return e.cause }

// Errorf returns an Error without a remedy.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// WithRemedy returns a copy of e with its remedy.
func (e *Error) WithRemedy(format string, args ...any) *Error {
	c := *e
	c.Remedy = fmt.Sprintf(format, args...)
	return &c
}

// CodeOf returns the code that err carries, CodeFailed if it carries none, and "" for nil.
func CodeOf(err error) Code {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return CodeFailed
}

func (c Code) httpStatus() int {
	switch c {
	case CodeUsage:
		return http.StatusBadRequest
	case CodeNotFound:
		return http.StatusNotFound
	case CodeRefused:
		return http.StatusConflict
	case CodeUnhealthy:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
