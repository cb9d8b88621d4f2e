package main

import (
	"context"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

// versions is what `tulle version -o json` prints.
type versions struct {
	Version string `json:"version"`
	Agent   string `json:"agent"` // of the running agent; empty if none answers
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func versionCommand() *cobra.Command {
	c := new(client)
	return c.flags(&cobra.Command{
		Use:   "version",
		Short: "Show the version of this program, and of the agent if one runs",
		Args:  exactly(),
		RunE: ask(c, func(ctx context.Context, a *api.Client, _ []string) (versions, error) {
			v := versions{Version: api.Version(), Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
			if s, err := a.Status(ctx); err == nil {
				v.Agent = s.Version
			}
			return v, nil
		}, func(p *printer, v versions) {
			p.line("tulle %s (%s %s/%s)", v.Version, v.Go, v.OS, v.Arch)
			switch v.Agent {
			case "":
				p.line("agent: none answers on %s", c.socket)
			case v.Version:
				p.line("agent %s", v.Agent)
			default:
				p.line("agent %s: restart it to run this version", v.Agent)
			}
		}, nil),
	}, quickTimeout)
}
