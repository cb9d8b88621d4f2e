package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// What --help says fits a terminal of 80 columns, but for a usage line with all that a command takes.
func TestHelpFits(t *testing.T) {
	seen := 0
	eachCommand(rootCommand(), func(c *cobra.Command) {
		seen++
		if c.Hidden || c.Parent() != nil && c.Parent().Name() == "completion" { // cobra's own texts
			return
		}
		var out strings.Builder
		c.SetOut(&out)
		c.InitDefaultHelpFlag()
		if err := c.Help(); err != nil {
			t.Errorf("%s: %v", c.CommandPath(), err)
		}
		for line := range strings.Lines(out.String()) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > helpWidth {
				t.Errorf("%s --help has a line of %d columns: %s", c.CommandPath(), n, line)
			}
		}
		if strings.Contains(out.String(), "FlagUsages") {
			t.Errorf("%s --help shows its template:\n%s", c.CommandPath(), out.String())
		}
	})
	if seen < 40 {
		t.Errorf("only %d commands", seen)
	}
}

func TestFill(t *testing.T) {
	for _, tc := range []struct{ text, filled, indented string }{
		{"", "", ""},
		{"one two\nthree", "one two\nthree", "one two\nthree"},
		{"one two three\n\nfour", "one two\nthree\n\nfour", "one two three\n\nfour"},
		{"a:\n  x  y  z  w  v\nb", "a:\n  x  y  z  w  v\nb", "a:\n\n      x  y  z  w  v\n\nb"},
		{"überäll eins", "überäll\neins", "überäll eins"},
		{"longerthanthat x", "longerthanthat\nx", "longerthanthat x"},
	} {
		if got := fill(tc.text, 10); got != tc.filled {
			t.Errorf("fill(%q) = %q, want %q", tc.text, got, tc.filled)
		}
		if got := indented(tc.text); got != tc.indented {
			t.Errorf("indented(%q) = %q, want %q", tc.text, got, tc.indented)
		}
	}
}

// Manual pages keep lists and drawings as help has them, and man(1) has nothing to warn of.
func TestManualPages(t *testing.T) {
	dir := t.TempDir()
	if code := run(t.Context(), []string{"man", dir}, nil, &strings.Builder{}, &strings.Builder{}); code != 0 {
		t.Fatalf("tulle man: exit code %d", code)
	}
	if _, err := exec.LookPath("man"); err != nil {
		t.Skip("needs man: apt-get install man-db")
	}
	show := func(page string) string {
		cmd := exec.CommandContext(t.Context(), "man", "--warnings", "-l", filepath.Join(dir, page))
		cmd.Env = append(cmd.Environ(), "MANWIDTH=100", "LC_ALL=C.UTF-8", "MANPAGER=cat", "MAN_KEEP_FORMATTING=")
		var out, warnings strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &warnings
		if err := cmd.Run(); err != nil || warnings.Len() > 0 {
			t.Errorf("man %s: %v\n%s", page, err, warnings.String())
		}
		return out.String()
	}
	for page, want := range map[string]string{
		"tulle.8":        "/run/tulle/tulle.sock   the control socket\n",
		"tulle-lab.8":    "  h1 ──┐                                            ┌── h2\n",
		"tulle-doctor.8": "  capabilities  CAP_NET_ADMIN and CAP_NET_RAW\n",
		"tulle-keys.8":   "  tulle keys list                               until all members have it\n",
	} {
		if got := show(page); !strings.Contains(got, want) {
			t.Errorf("man %s does not have the line %q:\n%s", page, want, got)
		}
	}
}
