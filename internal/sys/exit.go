package sys

import (
	"os/exec"
	"syscall"
)

// ExitCode is a process's exit code as a shell gives it: 128 plus the signal if one ended it.
func ExitCode(e *exec.ExitError) int {
	if ws, ok := e.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return e.ExitCode()
}
