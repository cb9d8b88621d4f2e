// Package tulle_test holds the rules that no single package can hold: who may import whom, that every package says what
// it is for, and that only one package may be unsafe. docs/design.md explains them.
package tulle_test

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/tulle-net/tulle"

// allowed lists, for each package of this module, which other packages of it the code (not its tests) may import. A
// trailing "/..." allows the package and all below it. A package that is not listed here fails the test: its place in
// the house must be decided first.
var allowed = map[string][]string{
	"cmd/tulle":                      {"internal/agent", "internal/config", "internal/api", "internal/lab", "internal/doctor", "internal/attach", "tunnel/capture", "bench", "bench/..."},
	"tunnel":                         {"tunnel/...", "internal/sys"},
	"tunnel/header":                  {},
	"tunnel/mtu":                     {"tunnel/header"},
	"tunnel/encap":                   {"tunnel/header", "tunnel/mtu"},
	"tunnel/offload":                 {"tunnel/header"},
	"tunnel/device":                  {"internal/sys", "tunnel/offload"},
	"tunnel/underlay":                {"internal/sys"},
	"tunnel/path":                    {"tunnel/mtu", "tunnel/encap"},
	"tunnel/route":                   {},
	"tunnel/capture":                 {"tunnel/header"},
	"tunnel/trace":                   {},
	"tunnel/fastpath":                {"internal/sys"},
	"tunnel/direct":                  {"tunnel/device", "tunnel/encap", "tunnel/header"},
	"membership":                     {},
	"membership/keyring":             {},
	"membership/gossip":              {"membership", "membership/keyring", "membership/seed"},
	"membership/seed":                {},
	"ipam":                           {},
	"bench":                          {"bench/...", "internal/lab", "internal/agent", "internal/api", "membership/..."},
	"bench/result":                   {},
	"bench/machine":                  {"bench/result", "internal/sys"},
	"bench/traffic":                  {"bench/result", "internal/sys"},
	"bench/report":                   {"bench/result"},
	"bench/pair":                     {"bench/result", "bench/machine", "bench/traffic"},
	"internal/agent":                 {"internal/config", "internal/ownership", "tunnel/...", "membership/...", "ipam", "internal/hostnet", "internal/podnet", "internal/cni/conflist", "internal/docker", "internal/api", "internal/sys"},
	"internal/config":                {},
	"internal/doctor":                {"internal/hostnet", "internal/podnet", "internal/api", "internal/cni/conflist", "internal/sys", "ipam", "membership/keyring", "membership/seed", "tunnel/underlay"},
	"internal/ownership":             {"membership", "ipam"},
	"internal/api":                   {},
	"internal/hostnet":               {"internal/sys"},
	"internal/sys":                   {},
	"cmd/tulle-cni":                  {"internal/cni", "internal/netavark"},
	"internal/cni/conflist":          {},
	"internal/cni":                   {"internal/api", "internal/attach", "internal/podnet"},
	"internal/docker":                {"internal/api", "internal/attach", "internal/podnet"},
	"internal/netavark":              {"internal/api", "internal/attach", "internal/podnet"},
	"internal/podnet":                {"internal/sys"},
	"internal/attach":                {"internal/api", "internal/podnet", "internal/sys"},
	"internal/lab":                   {"internal/sys", "internal/api", "internal/podnet", "internal/attach"},
	"internal/lab/clustertest":       {},
	"internal/lab/interop":           {},
	"internal/lab/pathtest":          {},
	"internal/lab/soak":              {},
	"internal/testing/controlsocket": {"internal/api"},
	"internal/testing/damage":        {},
	"internal/testing/debian":        {},
	"internal/testing/hosts":         {"internal/podnet", "internal/lab", "internal/api", "internal/sys", "internal/testing/stall", "internal/testing/testbuild"},
	"internal/testing/detour":        {},
	"internal/testing/dockerd":       {},
	"internal/testing/namespace":     {"internal/sys"},
	"internal/testing/stall":         {},
	"internal/testing/testbuild":     {},
}

// pure packages open no socket, read no clock and log nothing, so they do not import these.
var (
	pure      = []string{"tunnel/header", "tunnel/mtu", "tunnel/encap", "tunnel/offload", "tunnel/path", "tunnel/route", "membership"}
	forbidden = []string{"net", "os", "log", "log/slog", "syscall", "golang.org/x/sys/unix"}
)

// soleImporters lists packages which exactly one place of this module may import.
var soleImporters = map[string]string{
	"unsafe":                          "internal/sys",
	"github.com/hashicorp/memberlist": "membership/gossip",
}

type pkg struct {
	ImportPath, Dir       string
	Imports, GoFiles      []string
	Standard              bool
	TestGoFiles, CgoFiles []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Dir,Imports,GoFiles,TestGoFiles,CgoFiles", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); err == io.EOF {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func short(path string) string { return strings.TrimPrefix(path, module+"/") }

func permits(rules []string, imp string) bool {
	return slices.ContainsFunc(rules, func(r string) bool {
		base, deep := strings.CutSuffix(r, "/...")
		return imp == base || deep && strings.HasPrefix(imp, base+"/")
	})
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		name := short(p.ImportPath)
		if len(p.GoFiles) == 0 || p.ImportPath == module {
			continue
		}
		rules, known := allowed[name]
		if !known {
			t.Errorf("%s has no line in the table of allowed imports: decide its place first", name)
			continue
		}
		for _, imp := range p.Imports {
			if strings.HasPrefix(imp, module+"/") && !permits(rules, short(imp)) {
				t.Errorf("%s imports %s, which its place does not allow (allowed: %v)", name, short(imp), rules)
			}
			if slices.Contains(pure, name) && slices.Contains(forbidden, imp) {
				t.Errorf("%s is a pure package and imports %s", name, imp)
			}
			if sole, only := soleImporters[imp]; only && sole != name {
				t.Errorf("%s imports %s, which only %s may", name, imp, sole)
			}
		}
		if len(p.CgoFiles) > 0 {
			t.Errorf("%s uses cgo: %v", name, p.CgoFiles)
		}
	}
}

func TestOnePackageComment(t *testing.T) {
	for _, p := range packages(t) {
		var with []string
		for _, f := range p.GoFiles {
			if file := parse(t, filepath.Join(p.Dir, f), parser.ParseComments|parser.PackageClauseOnly); file.Doc != nil {
				with = append(with, f)
			}
		}
		if len(p.GoFiles) > 0 && len(with) != 1 {
			t.Errorf("%s: want exactly one package comment, found it in %v", short(p.ImportPath), with)
		}
	}
}

// Goroutines start in Run functions and end with them; the process ends in main. init functions hide both.
func TestNoInitNoExit(t *testing.T) {
	for _, p := range packages(t) {
		for _, f := range p.GoFiles {
			path := filepath.Join(p.Dir, f)
			file := parse(t, path, 0)
			for _, d := range file.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
					t.Errorf("%s/%s has an init function", short(p.ImportPath), f)
				}
			}
			if file.Name.Name == "main" {
				continue
			}
			ast.Inspect(file, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				if x, ok := sel.X.(*ast.Ident); ok && (x.Name == "os" && sel.Sel.Name == "Exit" || x.Name == "log" && strings.HasPrefix(sel.Sel.Name, "Fatal")) {
					t.Errorf("%s/%s calls %s.%s outside main", short(p.ImportPath), f, x.Name, sel.Sel.Name)
				}
				return true
			})
		}
	}
}

func parse(t *testing.T, path string, mode parser.Mode) *ast.File {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, mode)
	if err != nil {
		t.Fatal(err)
	}
	return file
}
