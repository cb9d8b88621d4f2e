// Command tulle is a userspace pod network. `tulle agent` is the daemon of a host; most other commands query or control it
// over its control socket.
//
// Exit codes: 0 healthy and done, 1 unhealthy or failed, 2 wrong usage. Results go to standard output: as a table, or with
// -o json as the types of the control socket. An error is one line on standard error.
package main

import (
	"context"
	"os"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
