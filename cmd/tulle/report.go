package main

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
	"github.com/tulle-net/tulle/internal/config"
)

// reportFlags are the flags of `tulle report`.
type reportFlags struct {
	socket, config, write string
}

func reportCommand() *cobra.Command {
	var f reportFlags
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Collect what a bug report needs in one file, without keys",
		Long: "Collect everything that a bug report needs in one file: what the agent says of itself and its peers, the host's links,\n" +
			"addresses, routes, rules, firewall and sysctls, the agent's log, and versions. What cannot be collected is named in it.\n\n" +
			"Whatever looks like a key of 32 bytes, and the keys among the sysctls, are replaced. Addresses and host names stay: look through the file before you send it.",
		Example: "  tulle report\n  tulle report -w - | tar tz",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr(), time.Now())
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.socket, "socket", api.DefaultSocket, "control socket of the agent")
	fl.StringVar(&f.config, "config", config.DefaultFile, "configuration `FILE` of the agent")
	fl.StringVarP(&f.write, "write", "w", "", "write to `FILE`; - is standard output (default tulle-report-HOST-TIME.tar.gz)")
	return cmd
}

func (f *reportFlags) run(ctx context.Context, out, errOut io.Writer, now time.Time) error {
	host, err := os.Hostname()
	if err != nil {
		host = "host"
	}
	name := fmt.Sprintf("tulle-report-%s-%s", host, now.UTC().Format("20060102-150405"))
	finish := func() error { return nil }
	if f.write != "-" {
		if f.write == "" {
			f.write = name + ".tar.gz"
		}
		file, err := os.OpenFile(f.write, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return fmt.Errorf("--write: %w", err)
		}
		out, finish = file, file.Close
	}
	zip := gzip.NewWriter(out)
	r := &report{tar: tar.NewWriter(zip), dir: name, now: now}
	r.agent(ctx, api.NewClient(f.socket))
	if self, err := os.Executable(); err == nil {
		r.command(ctx, "doctor", self, "doctor", "--socket", f.socket)
	}
	r.file("config.yaml", f.config)
	r.file("os-release", "/etc/os-release")
	for _, c := range reportCommands {
		r.command(ctx, strings.NewReplacer(" ", "_", "/", "_").Replace(c), strings.Fields(c)...)
	}
	r.add("missing.txt", []byte(strings.Join(append(r.missing, ""), "\n")))
	if err := errors.Join(r.err, r.tar.Close(), zip.Close(), finish()); err != nil {
		return fmt.Errorf("--write %s: %w", f.write, err)
	}
	if f.write != "-" {
		fmt.Fprintf(errOut, "tulle: %s: %s, %d missing (see missing.txt in it); it has addresses and host names, and no keys\n", f.write, plural(r.files, "file"), len(r.missing))
	}
	return nil
}

// reportCommands show the host.
var reportCommands = []string{
	"uname -a", "uptime",
	"ip -d link", "ip addr", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip neigh", "ip -s link",
	"nft list ruleset", "iptables-save", "ip6tables-save",
	"ss -lntup", "sysctl net.ipv4 net.ipv6.conf net.core net.netfilter",
	"systemctl status --no-pager tulle", "journalctl --no-pager -u tulle -n 5000", "dmesg",
}

// commandTimeout is what each command may take.
const commandTimeout = 10 * time.Second

// report writes the files of a report.
type report struct {
	tar     *tar.Writer
	dir     string
	now     time.Time
	files   int
	missing []string // what could not be collected, and why
	err     error    // of writing
}

// key is what a key of 32 bytes looks like in base64: those of gossip and of WireGuard.
var key = regexp.MustCompile(`[A-Za-z0-9+/]{43}=`)

// kernelKey is a sysctl that is a secret: tcp_fastopen_key, stable_secret, netdev_rss_key.
var kernelKey = regexp.MustCompile(`(?m)^(net\.\S*_(?:key|secret) = ).*$`)

// withoutKeys replaces what looks like a key.
func withoutKeys(b []byte) []byte {
	return kernelKey.ReplaceAll(key.ReplaceAll(b, []byte("[key left out]")), []byte("${1}[key left out]"))
}

func (r *report) add(name string, content []byte) {
	if r.err != nil {
		return
	}
	content = withoutKeys(content)
	r.err = r.tar.WriteHeader(&tar.Header{Name: r.dir + "/" + name, Mode: 0o600, Size: int64(len(content)), ModTime: r.now})
	if r.err == nil {
		_, r.err = r.tar.Write(content)
		r.files++
	}
}

func (r *report) lacks(what string, err error) {
	r.missing = append(r.missing, fmt.Sprintf("%s: %s", what, oneLine(err.Error())))
}

func (r *report) file(name, path string) {
	b, err := os.ReadFile(path)
	if err != nil {
		r.lacks(name, err)
		return
	}
	r.add(name, b)
}

// command adds what a command prints.
func (r *report) command(ctx context.Context, name string, args ...string) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	b, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil && len(b) == 0 {
		r.lacks("`"+strings.Join(args, " ")+"`", err)
	}
	if len(b) > 0 {
		r.add(name+".txt", b)
	}
}

// agent adds what the agent says.
func (r *report) agent(ctx context.Context, c *api.Client) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	r.add("version.txt", []byte("program "+api.Version()+"\n"))
	r.answer("status.json", func() (any, error) { return c.Status(ctx) })
	r.answer("peers.json", func() (any, error) { return c.Peers(ctx) })
	r.answer("ipam.json", func() (any, error) { return c.IPAM(ctx) })
	r.answer("ipam-check.json", func() (any, error) { return c.IPAMCheck(ctx) })
	r.answer("pods.json", func() (any, error) { return c.Pods(ctx) })
	r.answer("external.json", func() (any, error) { return c.Externals(ctx) })
	r.answer("keys.json", func() (any, error) { return c.Keys(ctx) }) // their IDs
}

func (r *report) answer(name string, ask func() (any, error)) {
	v, err := ask()
	if err != nil {
		r.lacks(name, err)
		return
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		r.lacks(name, err)
		return
	}
	r.add(name, b)
}
