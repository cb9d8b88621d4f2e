package testbuild

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestTulle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tulle")
	if err := Tulle(path, nil); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(path, "version").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if err := Tulle(path, nil, "-no-such-flag"); err == nil || !strings.Contains(err.Error(), "no-such-flag") {
		t.Errorf("a build that fails: %v", err)
	}
}

func TestSources(t *testing.T) {
	have, err := sources(nil, commands+"tulle")
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"go.mod", "cmd/tulle", "cmd/tulle/main.go", "membership/meta.go", "tunnel/header", "tunnel/header/inner.go"} {
		if !slices.Contains(have, filepath.Join(root, want)) {
			t.Errorf("lacks %s", want)
		}
	}
}
