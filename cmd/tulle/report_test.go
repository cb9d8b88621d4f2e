package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A report has what the agent says and what the host shows, but no key: neither the configuration's nor another program's.
func TestReport(t *testing.T) {
	secret := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa5, 7}, 16))
	dir := t.TempDir()
	conf := filepath.Join(dir, "tulle.yaml")
	if err := os.WriteFile(conf, []byte("# old key: "+secret+"\njoin: [node-b]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"report", "--socket", filepath.Join(dir, "none.sock"), "--config", conf, "-w", "-"}, nil, &out, &errs); code != exitOK {
		t.Fatalf("exit code %d: %s", code, &errs)
	}
	zip, err := gzip.NewReader(&out)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = string(b)
	}
	for name, want := range map[string]string{
		"config.yaml": "old key: [key left out]\njoin: [node-b]", "missing.txt": "status.json: no agent listens", "uname_-a.txt": "Linux", "version.txt": "program ",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q: %q", name, want, files[name])
		}
	}
	for name, text := range files {
		if strings.Contains(text, secret) {
			t.Errorf("%s has the key", name)
		}
	}
}
