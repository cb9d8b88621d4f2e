package tulle_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/tulle-net/tulle/bench/result"
	"github.com/tulle-net/tulle/tunnel/encap"
)

// These tests hold what the pages under docs/ say against the program, where that is cheap.

func page(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// pages returns all Markdown files of the repository.
func pages(t *testing.T) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && strings.HasPrefix(d.Name(), "."), d.IsDir() && d.Name() == "testdata":
			return fs.SkipDir
		case strings.HasSuffix(path, ".md"):
			list = append(list, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestDropsAreDocumented(t *testing.T) {
	text := page(t, "docs/wire.md")
	for d := range encap.Drops() {
		if !strings.Contains(text, "`"+d.String()+"`") {
			t.Errorf("docs/wire.md does not have the drop %q", d)
		}
	}
}

func TestMetricsAreDocumented(t *testing.T) {
	text := page(t, "docs/operations.md")
	names := regexp.MustCompile(`desc\("([a-z_]+)", "`).FindAllStringSubmatch(page(t, "internal/agent/metrics.go"), -1)
	if len(names) < 10 {
		t.Fatalf("%d metrics in internal/agent/metrics.go: are they made otherwise now?", len(names))
	}
	for _, m := range names {
		if !strings.Contains(text, "`tulle_"+m[1]+"`") {
			t.Errorf("docs/operations.md does not have the metric tulle_%s", m[1])
		}
	}
}

// commands runs `tulle WORDS… --help` and returns the commands that it lists.
func commands(t *testing.T, binary string, words ...string) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), binary, append(words, "--help")...).CombinedOutput()
	if err != nil {
		t.Fatalf("tulle %v --help: %v\n%s", words, err, out)
	}
	var list []string
	in := false
	for line := range strings.Lines(string(out)) {
		word, _, _ := strings.Cut(strings.TrimPrefix(line, "  "), " ")
		switch {
		case !strings.HasPrefix(line, " "):
			title := strings.TrimSpace(line)
			in = slices.Contains([]string{"Inspect:", "Change:", "Run:", "Additional Commands:", "Available Commands:"}, title) || in && title == ""
		case in && strings.HasPrefix(line, "  ") && word != "":
			list = append(list, word)
		}
	}
	return list
}

// built is the program, made anew for this test.
func built(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "tulle")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", binary, "./cmd/tulle").CombinedOutput(); err != nil {
		t.Fatalf("go build ./cmd/tulle: %v\n%s", err, out)
	}
	return binary
}

func TestCommandsAreDocumented(t *testing.T) {
	binary, text := built(t), page(t, "docs/operations.md")
	top := commands(t, binary)
	if !slices.Contains(top, "status") || !slices.Contains(top, "agent") {
		t.Fatalf("these are not all commands: %q", top)
	}
	known := map[string][]string{"": top}
	for _, c := range top {
		if !regexp.MustCompile("tulle " + c + `\b`).MatchString(text) {
			t.Errorf("docs/operations.md does not have `tulle %s`", c)
		}
		known[c] = commands(t, binary, c)
	}
	// And the other way: the pages name no command that does not exist.
	called := regexp.MustCompile("(?:`|# |^ {4}|\\| )tulle ([a-z-]+)(?: ([a-z]+))?")
	for _, name := range pages(t) {
		for n, line := range strings.Split(page(t, name), "\n") {
			for _, m := range called.FindAllStringSubmatch(line, -1) {
				if !slices.Contains(top, m[1]) {
					t.Errorf("%s:%d: there is no `tulle %s`", name, n+1, m[1])
				} else if subs := known[m[1]]; m[2] != "" && len(subs) > 0 && m[1] != "help" && !slices.Contains(subs, m[2]) {
					t.Errorf("%s:%d: there is no `tulle %s %s`", name, n+1, m[1], m[2])
				}
			}
		}
	}
}

// anchors are the names that a page's headings get: letters, digits, "-" and "_" in lower case, blanks as "-".
func anchors(text string) []string {
	var list []string
	code := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "```") {
			code = !code
		}
		title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " ")
		if code || !ok || !strings.HasPrefix(line, "#") {
			continue
		}
		list = append(list, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, strings.TrimSpace(title)))
	}
	return list
}

func TestLinksResolve(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	seen := 0
	for _, name := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(page(t, name), -1) {
			path, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(path, "://") {
				continue
			}
			seen++
			target := name
			if path != "" {
				target = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which is not there", name, m[1])
				continue
			}
			if anchor != "" && !slices.Contains(anchors(page(t, target)), anchor) {
				t.Errorf("%s links to %s: %s has no such heading", name, m[1], target)
			}
		}
	}
	if seen < 20 {
		t.Errorf("only %d links found in %d pages", seen, len(pages(t)))
	}
}

func TestDecisionsAreListed(t *testing.T) {
	text := strings.ReplaceAll(page(t, "docs/decisions/README.md"), "`", "")
	files, err := filepath.Glob("docs/decisions/[0-9]*.md")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		title, _, _ := strings.Cut(strings.TrimPrefix(strings.ReplaceAll(page(t, f), "`", ""), "# "), "\n")
		base := filepath.Base(f)
		if want := fmt.Sprintf("[%s](%s) | %s |", base[:4], base, title); !strings.Contains(text, want) {
			t.Errorf("docs/decisions/README.md does not have the line %q", want)
		}
	}
}

func TestMakeTargets(t *testing.T) {
	makefile := page(t, "Makefile")
	for _, name := range pages(t) {
		for _, m := range regexp.MustCompile("(?m)(?:^ {4}|`)make ([a-z0-9]+)").FindAllStringSubmatch(page(t, name), -1) {
			if !strings.Contains(makefile, "\n"+m[1]+":") {
				t.Errorf("%s: there is no `make %s`", name, m[1])
			}
		}
	}
}

// The table of the README is drawn from the published run, not by hand.
func TestMeasuredTable(t *testing.T) {
	_, rest, ok := strings.Cut(page(t, "README.md"), "<!-- bench:begin: drawn by make report -->\n")
	table, _, end := strings.Cut(rest, "<!-- bench:end -->\n")
	if !ok || !end {
		t.Fatal("README.md has no place for the table of measurements")
	}
	f, err := os.Open("docs/bench/result.json")
	if errors.Is(err, fs.ErrNotExist) {
		if strings.Contains(table, "|") {
			t.Errorf("README.md has a table of measurements, but docs/bench/result.json is missing:\n%s", table)
		}
		return
	} else if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := result.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	if err := r.WriteMarkdown(&want); err != nil {
		t.Fatal(err)
	}
	if table != want.String() {
		t.Errorf("README.md has not the table of docs/bench/result.json: run .ci/bench-table\n%s", want.String())
	}
}
