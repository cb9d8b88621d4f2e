// Package config reads the agent's configuration: flags, and a strict YAML file with the same keys. One table (keys.go)
// defines keys, defaults and checks, and generates the reference page docs/configuration.md.
//
// A key has "-" as a flag and "_" in the file. A flag overrides the file. Unknown keys, duplicate keys and invalid values are
// refused with their line number. Every error is one line that names the place, the value, the limit and the remedy.
//
// A Config is never modified after Load, so any number of goroutines may read it. Packages below internal/agent do not use
// the types of this package.
package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"

	"github.com/spf13/pflag"
)

// DefaultFile is the configuration file unless --config names another. It is optional.
const DefaultFile = "/etc/tulle/tulle.yaml"

// Config is a validated configuration with defaults filled in.
type Config struct {
	NodeName  string
	Join      []string // HOST:PORT, each once, IPv6 in brackets
	Bootstrap bool     // this node starts the cluster when all seeds have answered and none is in a cluster
	// ForceBootstrap means that it starts the cluster even if some seeds do not answer.
	ForceBootstrap bool
	// Bootstrapper is the node that starts the cluster according to the file; empty if it names none or a flag overrides it.
	Bootstrapper string
	// ClusterCIDRs are the configured prefixes, at most one per family. Empty means those of the cluster, or BootstrapCIDRs.
	ClusterCIDRs   []netip.Prefix
	NodePrefixLen4 int // length of an IPv4 block, bits
	NodePrefixLen6 int // length of an IPv6 block, bits
	// AskedPrefixLen4 and AskedPrefixLen6 are the same if they were configured, else 0.
	AskedPrefixLen4, AskedPrefixLen6 int

	PodCIDRs      []netip.Prefix
	Underlay      Underlay
	GossipPort    uint16
	GossipKeyFile string // empty: gossip is not encrypted
	UDPPort       uint16
	VXLANPort     uint16
	VNI           uint32
	VTEPMAC       [6]byte  // zero: made out of the node ID
	Paths         []string // of direct, udp, ipip, vxlan; in order of preference, each at most once, at least one
	FastPath      bool     // the kernel carries packets in the agent's place
	Tun           string
	MTU           int // of the TUN, bytes; 0: derived from the underlay's
	Queues        int // of the TUN; 0: by the number of CPUs
	Masquerade    bool
	NoMasquerade  []netip.Prefix // outside networks that see pods' own addresses; sorted, each once
	CNIDir        string         // where container engines look for networks; empty: not published
	CNIBinDir     string         // their plugins; empty: not looked at
	CNIBridge     string         // on the host, which pods of these engines are behind; empty: none
	DockerSocket  string         // of the driver for Docker; empty: not served
	DockerAPI     string         // the socket where the engine serves; empty: it is not asked
	StateDir      string
	Socket        string
	Metrics       string // HOST:PORT; empty: not served
	BenchMbps     int    // the most that a benchmark from or to another member may send, Mb/s of payload; 0: none may run
	LogLevel      slog.Level
	LogFormat     string // text or json

	hostNamed bool // NodeName is the host's name

	file  string // that was read, or would have been
	given given
	// needed and level are shared with what Reread returns.
	needed *atomic.Bool // the file was named, or was there once: without it, a reload would set everything to its default
	level  *slog.LevelVar
}

// Underlay selects the address of this host that carries the tunnel: that of an interface, or the given addresses (at most
// one per family). If both are empty, it is the source of the route to the seeds.
type Underlay struct {
	Interface string
	Addresses []netip.Addr
}

// given has the values on the command line by key.
type given map[string][]string

// AddFlags adds a flag for every key of the table, and --config.
func AddFlags(flags *pflag.FlagSet) {
	flags.SortFlags = false
	flags.String("config", DefaultFile, "`FILE` with the same keys, written with \"_\"; flags win")
	for i := range keys {
		k := &keys[i]
		f := flags.VarPF(&value{key: k}, k.flag(), "", k.usage())
		if k.kind == kindBool || k.kind == kindBootstrap {
			f.NoOptDefVal = "true"
		}
	}
}

// Load reads the file and the flags. AddFlags must have prepared the flags, and they must be parsed. An empty file means that
// of --config. The default file is optional.
func Load(flags *pflag.FlagSet, file string) (Config, error) {
	named := file != ""
	if f := flags.Lookup("config"); !named && f != nil {
		file, named = f.Value.String(), f.Changed
	}
	g := given{}
	flags.Visit(func(f *pflag.Flag) {
		if v, ok := f.Value.(*value); ok {
			g[v.key.name] = v.texts
		}
	})
	needed := new(atomic.Bool)
	needed.Store(named)
	c, err := load(g, file, needed, "name the file with --config")
	if err != nil {
		return Config{}, err
	}
	c.level.Set(c.LogLevel)
	return c, nil
}

// Reread reads the file again, with the same flags as before. A file that was named, or was there before, must be there. The
// result shares its LevelVar with c; Reread does not set it.
func (c Config) Reread() (Config, error) {
	n, err := load(c.given, c.file, c.needed, "put the file back; an empty one stands for the defaults")
	if err != nil {
		return Config{}, err
	}
	n.level = c.level
	return n, nil
}

// Renamed returns the configuration with the host's present name, and true if that is another one than before: a host that boots may get its name later,
// from DHCP or cloud-init. Nothing changes where node_name is configured, and where the host has lost its name, or is called localhost again.
func (c Config) Renamed() (Config, bool) {
	name, err := parseNodeName("")
	if !c.hostNamed || err != nil || name == c.NodeName || strings.EqualFold(strings.SplitN(name, ".", 2)[0], "localhost") {
		return c, false
	}
	c.NodeName = name
	if c.Bootstrapper != "" {
		c.Bootstrap = c.namesThis(c.Bootstrapper)
	}
	return c, true
}

// namesThis compares names of nodes as names of hosts are compared (RFC 4343).
func (c *Config) namesThis(name string) bool { return strings.EqualFold(name, c.NodeName) }

// File returns the path of the configuration file, which may not exist.
func (c Config) File() string { return c.file }

// LevelVar returns the level of the program's logger. Load sets it; a reload may change it.
func (c Config) LevelVar() *slog.LevelVar { return c.level }

// BootstrapCIDRs returns the address space for a cluster that this node starts.
func (c Config) BootstrapCIDRs() []netip.Prefix {
	if len(c.ClusterCIDRs) > 0 {
		return c.ClusterCIDRs
	}
	return []netip.Prefix{defaultClusterCIDR}
}

func load(g given, file string, needed *atomic.Bool, remedy string) (Config, error) {
	c := Config{file: file, given: g, needed: needed, level: new(slog.LevelVar)}
	fromFile, err := readFile(file, remedy)
	switch {
	case err == nil:
		needed.Store(true)
	case needed.Load() || !errors.Is(err, fs.ErrNotExist):
		return c, err
	}
	at := origins{}
	for i := range keys {
		k := &keys[i]
		texts, where := k.defaults(), ""
		if e, ok := fromFile[k.name]; ok {
			texts, where = e.texts, fmt.Sprintf("%s:%d: %s", file, e.line, k.name)
		}
		if t, ok := g[k.name]; ok {
			texts, where = t, "--"+k.flag()
		}
		at[k.name] = where
		if k.list {
			texts = split(texts)
		}
		if k.kind == kindBootstrap {
			_, byFlag := g[k.name]
			err = c.setBootstrap(texts, byFlag)
		} else {
			err = k.set(&c, texts)
		}
		if err != nil {
			return c, at.wrap(k.name, err)
		}
		if k.name == "node_prefix_len" && where != "" {
			c.AskedPrefixLen4, c.AskedPrefixLen6 = askedLens(texts)
		}
	}
	return c, c.validate(at)
}

// split splits lists at commas and omits empty elements, so that `--join=` clears the value of the file.
func split(texts []string) []string {
	var out []string
	for _, t := range texts {
		for s := range strings.SplitSeq(t, ",") {
			if s = strings.TrimSpace(s); s != "" {
				out = append(out, s)
			}
		}
	}
	return out
}

// origins has the place of each value; "" for a default.
type origins map[string]string

// wrap prefixes an error with the place of the value.
func (o origins) wrap(name string, err error) error {
	where := o[name]
	if where == "" {
		where = "--" + flagName(name) + " (default)"
	}
	return fmt.Errorf("%s %w", where, err)
}

// Change is one key whose value differs between two configurations.
type Change struct {
	Key      string
	Old, New string
	Live     bool // may change while the agent runs
}

// Diff lists the keys that differ, in the order of the table.
func Diff(before, after Config) []Change {
	var out []Change
	for _, k := range keys {
		if o, n := k.show(&before), k.show(&after); o != n {
			out = append(out, Change{Key: k.name, Old: o, New: n, Live: k.live})
		}
	}
	return out
}

// maxFile is the maximum size of the configuration file, in bytes.
const maxFile = 64 << 10

func readFile(path, remedy string) (map[string]entry, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) {
		remedy = "run as root"
	}
	if err != nil {
		return nil, fmt.Errorf("configuration: %w; %s", err, remedy)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w; %s", err, remedy)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("configuration: %s is larger than %d bytes; name the right file with --config", path, maxFile)
	}
	return parseFile(path, data)
}

// value is a flag. It keeps the strings; Load checks them together with those of the file.
type value struct {
	key   *key
	texts []string
}

// Set implements pflag.Value.
func (v *value) Set(s string) error {
	if !v.key.list {
		v.texts = nil
	}
	v.texts = append(v.texts, s)
	return nil
}

// String implements pflag.Value; it is the default in the help text until something was given.
func (v *value) String() string {
	if v.key == nil || v.texts == nil {
		return ""
	}
	return strings.Join(v.texts, ",")
}

// Type implements pflag.Value: the placeholder in the help text.
func (v *value) Type() string {
	if v.key.kind == kindBool || v.key.kind == kindBootstrap {
		return "bool"
	}
	return v.key.arg
}
