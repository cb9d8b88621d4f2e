package api

import (
	"errors"
	"fmt"
	"net/http"
)

// Code tells a caller what kind of failure it was. It decides the exit code of the command line.
type Code string

// The codes. Usage ends the command line with 2, all others with 1.
const (
	CodeUsage     Code = "usage"     // the request cannot be right: a bad address, an unknown encapsulation
	CodeNotFound  Code = "not_found" // no such node, address, key
	CodeRefused   Code = "refused"   // a guard holds: forget of a live node, release of an address in use
	CodeUnhealthy Code = "unhealthy" // the agent cannot do it now: isolated, no space, not ready
	CodeNoAgent   Code = "no_agent"  // nobody answers on the socket (made by Client, never sent)
	CodeFailed    Code = "failed"    // anything else
)

// Error is a failure with its code and, where there is one, its remedy.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
}

// Error gives one line: what went wrong, then the remedy.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Message
	}
	return e.Message + "; " + e.Remedy
}

// Errorf makes an Error without a remedy.
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
