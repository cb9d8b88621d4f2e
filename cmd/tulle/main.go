// Command tulle is a userspace pod network: `tulle agent` is the daemon of a host, everything else looks at it or asks
// something of it over its control socket.
//
// Exit codes: 0 healthy and done, 1 unhealthy or failed, 2 usage. What a command found goes to standard output, as a table
// for people or, with -o json, as the control socket's own types; errors are one line on standard error.
package main

import (
	"context"
	"os"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
