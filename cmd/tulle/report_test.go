package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tulle-net/tulle/internal/testing/namespace"
)

// A report has what the agent says and what the host shows, but no key: neither the configuration's nor another program's.
func TestReport(t *testing.T) {
	secret := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xa5, 7}, 16))
	dir := t.TempDir()
	conf := filepath.Join(dir, "tulle.yaml")
	if err := os.WriteFile(conf, []byte("# old key: "+secret+"\njoin: [node-b]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	files, err := reported(t, filepath.Join(dir, "none.sock"), conf)
	if err != nil {
		t.Fatal(err)
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

// The kernel's own secrets are among the sysctls.
func TestReportWithoutSecretsOfTheKernel(t *testing.T) {
	if _, err := exec.LookPath("sysctl"); err != nil {
		t.Skip(err)
	}
	secrets := map[string]string{
		"/proc/sys/net/ipv4/tcp_fastopen_key":           "0123abcd-4567ef01-89abcdef-feedc0de",
		"/proc/sys/net/ipv6/conf/lo/stable_secret":      "2001:0db8:05ec:ca11:4567:89ab:cdef:1234",
		"/proc/sys/net/ipv6/conf/default/stable_secret": "2001:0db8:05ec:ca12:4567:89ab:cdef:1234",
		"/proc/sys/net/ipv4/tcp_fastopen":               "", // no secret
		"/proc/sys/net/ipv4/conf/all/accept_redirects":  "",
	}
	namespace.New(t).Do(func() error {
		for file, value := range secrets {
			if value == "" {
				continue
			}
			if err := os.WriteFile(file, []byte(value), 0); err != nil {
				return err
			}
		}
		files, err := reported(t, filepath.Join(t.TempDir(), "none.sock"), os.DevNull)
		for name, text := range files {
			for file, value := range secrets {
				if value != "" && strings.Contains(text, value) {
					t.Errorf("%s has %s", name, file)
				}
			}
		}
		text := files["sysctl_net.ipv4_net.ipv6.conf_net.core_net.netfilter.txt"]
		for file, value := range secrets {
			want := strings.ReplaceAll(strings.TrimPrefix(file, "/proc/sys/"), "/", ".") + " = "
			if value != "" {
				want += "[key left out]"
			}
			if !strings.Contains(text, want) {
				t.Errorf("the sysctls lack %q", want)
			}
		}
		return err
	})
}

// reported are the files of a report, by their names.
func reported(t *testing.T, socket, conf string) (map[string]string, error) {
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"report", "--socket", socket, "--config", conf, "-w", "-"}, nil, &out, &errs); code != exitOK {
		return nil, fmt.Errorf("exit code %d: %s", code, &errs)
	}
	zip, err := gzip.NewReader(&out)
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	for r := tar.NewReader(zip); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = string(b)
	}
}
