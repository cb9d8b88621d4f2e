package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tulle-net/tulle/bench/result"
)

// sample is a run made by hand, of two modes and one that is missing.
func sample() *result.Run {
	r := &result.Run{
		Format: result.Format, Version: result.Version, Kind: result.Lab, Started: time.Unix(1e9, 0).UTC(), Rounds: 5, Duration: 1, References: []string{"kernel-vxlan"},
		Machines: []result.Machine{{Kernel: "6.1", CPU: "<b>CPU</b>"}}, Warnings: []string{"others <were> busy"},
		Modes: []result.Mode{{Name: "kernel-vxlan"}, {Name: "udp", Tulle: true, Errors: []string{"round 1: no answer", "round 2: <no> answer"}}, {Name: "kernel-ipip", Missing: "no such device", Lacking: true}},
	}
	for i := range 5 {
		for m := range 2 {
			l := result.Latency{Kind: result.PingPong, Payload: 64, Seconds: 1, Times: result.NewHistogram()}
			for k := range 1000 {
				l.Times.Record(time.Duration((m+1)*(k+10)) * time.Microsecond)
				l.Answers++
			}
			r.Modes[m].Rounds = append(r.Modes[m].Rounds, result.Round{
				Latency:   []result.Latency{l},
				Breakdown: []result.Breakdown{{Traffic: result.TraceTCP, Stages: []result.StageTime{{Name: "read", Nanoseconds: 100}, {Name: "send", Nanoseconds: float64(1000 * (m + 1))}}}},
				TCP:       []result.TCP{{Streams: 1, Bytes: 1e9, Seconds: 1, Gbps: float64(5+m) + float64(i)/10, CPU: result.CPUUse{Busy: 2}}},
			})
		}
	}
	r.Summarise()
	return r
}

func TestReport(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "report")
	r := sample()
	if err := Write(r, dir); err != nil {
		t.Fatal(err)
	}
	read := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	html := read("index.html")
	for _, want := range []string{
		"NOT TO BE TRUSTED", `udp: 2 measures failed, <a href="#modes">as said below</a>`, "failed: round 2: &lt;no&gt; answer", "others &lt;were&gt; busy", "&lt;b&gt;CPU&lt;/b&gt;", "prefers-color-scheme: dark", "kernel-ipip</b>: . Not measured: no such device",
		`download="result.json" href="data:application/json;base64,`, `id="latency-ping-pong-64"`, `id="ratio-tcp1_gbps"`, `id="value-cpu_s_per_gb"`, `id="breakdown-tcp"`, "TUN read", "time of a packet", "kernel-vxlan",
	} {
		if !strings.Contains(html, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	// It needs nothing from elsewhere, and runs nothing.
	for _, bad := range []string{"<script", "<link", "@import", "url(", "ZgotmplZ"} {
		if strings.Contains(html, bad) {
			t.Errorf("the page has %q", bad)
		}
	}
	for _, m := range regexp.MustCompile(`(?:href|src)="([^"]{0,40})`).FindAllStringSubmatch(html, -1) {
		if !strings.HasPrefix(m[1], "data:") && !strings.Contains(html, `id="`+strings.TrimPrefix(m[1], "#")+`"`) {
			t.Errorf("the page links to %q", m[1])
		}
	}
	back, err := result.Read(strings.NewReader(read("result.json")))
	if err != nil || back.Verdict() != r.Verdict() {
		t.Errorf("the data beside the page is another run: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	pictures := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		switch filepath.Ext(f) {
		case ".png":
			pictures++
			if img, err := png.Decode(bytes.NewReader(b)); err != nil || img.Bounds().Dx() < 800 {
				t.Errorf("%s: %v", f, err)
			}
		case ".svg":
			dec := xml.NewDecoder(bytes.NewReader(b))
			for err = error(nil); err == nil; {
				_, err = dec.Token()
			}
			if !errors.Is(err, io.EOF) || bytes.Contains(b, []byte("NaN")) || bytes.Contains(b, []byte("#-")) {
				t.Errorf("%s is not well formed: %v", f, err)
			}
		case ".new":
			t.Errorf("%s was left behind", f)
		}
	}
	if pictures < 6 {
		t.Errorf("%d pictures in %v", pictures, files)
	}
}

func TestReportOfLittle(t *testing.T) {
	short := result.Latency{Kind: result.PingPong, Payload: 64, Seconds: 1, Answers: 1, Times: result.NewHistogram()}
	short.Times.Record(200 * time.Nanosecond)
	for name, r := range map[string]*result.Run{
		"nothing":          {},
		"one mode":         {Kind: result.Pair, Modes: []result.Mode{{Name: "x"}}},
		"one round":        {Modes: []result.Mode{{Name: "x", Rounds: []result.Round{{TCP: []result.TCP{{Streams: 1, Gbps: 1}}}}}}},
		"one short answer": {Modes: []result.Mode{{Name: "x", Rounds: []result.Round{{Latency: []result.Latency{short}}}}}},
		"zero":             {Modes: []result.Mode{{Name: "x", Rounds: []result.Round{{UDP: []result.RateSearch{{Payload: 64}}}}}}},
	} {
		r.Summarise()
		if _, err := Files(r); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A stored run may be anybody's: its names lead to no other folder, and run nothing.
func TestReportOfAnybody(t *testing.T) {
	const bad = `/../../x"><script>alert(1)</script>`
	r := sample()
	r.Limits, r.Modes[0].Name, r.Tulle = []string{"held to 5 Mb/s"}, bad, bad
	for i := range r.Modes[1].Rounds {
		r.Modes[1].Rounds[i].Latency[0].Kind = bad
		r.Modes[1].Rounds[i].Breakdown[0].Traffic = bad
	}
	r.Summarise()
	files, err := Files(r)
	if err != nil {
		t.Fatal(err)
	}
	for name := range files {
		if strings.ContainsAny(name, `/"<`) {
			t.Errorf("a file is called %q", name)
		}
	}
	html := string(files["index.html"])
	if strings.Contains(html, "<script") || !strings.Contains(html, "&lt;script") || !strings.Contains(html, `class="limit">held to 5 Mb/s`) {
		t.Error("the page runs what a name says, or lacks that the run was limited")
	}
}

// What cannot take its place leaves nothing behind.
func TestReportInTheWay(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "index.html", "mine"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := Write(sample(), dir); err == nil || !strings.Contains(err.Error(), "index.html") {
		t.Errorf("got %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.new")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A scale has at least two numbers, however little of it there is.
func TestTicks(t *testing.T) {
	for _, ends := range [][2]float64{{15124, 15131}, {1, 1000}, {0.95, 2.1}, {5.1, 5.9}} {
		labels := 0
		for _, k := range (logTicks{}).Ticks(ends[0], ends[1]) {
			if k.Label != "" && k.Value >= ends[0] && k.Value <= ends[1] {
				labels++
			}
		}
		if labels < 2 {
			t.Errorf("from %v to %v there are %d numbers", ends[0], ends[1], labels)
		}
	}
}

// A disk that fills up is an error, and no half file stays.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := Write(sample(), dir); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*.new")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A folder that cannot be written is said before the run.
func TestReportRefused(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Prepare(filepath.Join(file, "report")); err == nil || !strings.Contains(err.Error(), "folder of the report") {
		t.Errorf("got %v", err)
	}
	// A run that is refused, or has no result, has made no folder.
	dir := filepath.Dir(file)
	if err := Prepare(filepath.Join(dir, "new", "report")); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if err := Prepare(dir); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) != 1 {
		t.Errorf("of a folder that was there is left: %v, %v", left, err)
	}
}
