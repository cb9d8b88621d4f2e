// Package report draws a run of the benchmarks as one page that needs nothing else: no network, no script, light and
// dark, with the plots and all data in it. It writes the page, the data and the plots as files into a folder.
package report

import (
	"bytes"
	_ "embed" // the page's template
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tulle-net/tulle/bench/result"
)

//go:embed page.html
var pageTemplate string

// page is what the template gets.
type page struct {
	*result.Run
	Parts     []section
	JSON, CSV template.URL
}

// section is a part of the page with plots.
type section struct {
	Title, ID string
	Note      string
	Pictures  []picture
}

type picture struct {
	Picture
	Inline template.HTML
	AsSVG  template.URL
	AsPNG  template.URL
}

func dataURL(kind string, b []byte) template.URL {
	return template.URL("data:" + kind + ";base64," + base64.StdEncoding.EncodeToString(b))
}

// Files returns the files of a report by their names: index.html, result.json, result.csv and the plots.
func Files(r *result.Run) (map[string][]byte, error) {
	pictures, err := Pictures(r)
	if err != nil {
		return nil, fmt.Errorf("plots: %w", err)
	}
	files := map[string][]byte{}
	var raw, table bytes.Buffer
	if err := errors.Join(r.WriteJSON(&raw), r.WriteCSV(&table)); err != nil {
		return nil, err
	}
	files["result.json"], files["result.csv"] = raw.Bytes(), table.Bytes()
	p := page{Run: r, JSON: dataURL("application/json", raw.Bytes()), CSV: dataURL("text/csv", table.Bytes())}
	for i, title := range Parts {
		s := section{Title: title, ID: fmt.Sprintf("part%d", i+1)}
		for _, d := range pictures {
			if d.Part != title {
				continue
			}
			files[d.Name+".svg"], files[d.Name+".png"] = d.SVG, d.PNG
			s.Pictures = append(s.Pictures, picture{
				Picture: d, Inline: template.HTML(d.SVG), AsSVG: dataURL("image/svg+xml", d.SVG), AsPNG: dataURL("image/png", d.PNG),
			})
		}
		if title == Parts[2] {
			s.Note = breakdownNote
		}
		if len(s.Pictures) > 0 {
			p.Parts = append(p.Parts, s)
		}
	}
	t, err := template.New("page").Funcs(template.FuncMap{
		"digits": result.Digits,
		"spread": func(m result.Mode, key string) result.Spread { return m.Summary[key] },
		"ratio": func(m result.Mode, key string) result.Spread {
			s, _ := r.Ratio(m.Name, r.ReferenceOf(&m), key)
			return s
		},
	}).Parse(pageTemplate)
	if err != nil {
		return nil, err
	}
	var html bytes.Buffer
	if err := t.Execute(&html, p); err != nil {
		return nil, err
	}
	files["index.html"] = html.Bytes()
	return files, nil
}

// Prepare makes sure that a report can be written into a folder, before a long run. It leaves nothing behind: Write makes the folder if it is missing.
func Prepare(dir string) (err error) {
	var made []string // the innermost first
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		made = append(made, d)
	}
	defer func() {
		for _, d := range made {
			_ = os.Remove(d) // it may never have come to be
		}
	}()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("folder of the report: %w", err)
	}
	f, err := os.CreateTemp(dir, ".report-*")
	if err != nil {
		return fmt.Errorf("folder of the report: %w", err)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// Write writes the files of a report into a folder. Each file is there completely or as it was before.
func Write(r *result.Run, dir string) error {
	files, err := Files(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("folder of the report: %w", err)
	}
	for name, b := range files {
		if err := replace(filepath.Join(dir, name), b); err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
	}
	return nil
}

func replace(path string, b []byte) error {
	temporary := path + ".new"
	if err := os.WriteFile(temporary, b, 0o644); err != nil {
		return errors.Join(err, discard(temporary))
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, discard(temporary))
	}
	return nil
}

// discard removes a file that may not be there.
func discard(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
