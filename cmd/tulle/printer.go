package main

import (
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// printer collects the lines of one screen and wraps them at spaces to its width. Without a width it does not wrap.
type printer struct {
	strings.Builder
	width int // columns; 0: no limit
	now   time.Time
}

const (
	gap      = 2  // spaces between columns
	minField = 24 // if the last column would get less, it is printed below its row
)

// line writes one formatted line, wrapped if it is too long.
func (p *printer) line(format string, args ...any) {
	for _, l := range wrap(fmt.Sprintf(format, args...), p.width) {
		p.WriteString(l + "\n")
	}
}

// fields writes a block of "name  value" lines with values aligned and wrapped. Lines without a value are omitted.
func (p *printer) fields(pairs ...[2]string) {
	t := table{}
	for _, f := range pairs {
		if f[1] != "" {
			t.row(f[0], f[1])
		}
	}
	p.table(&t)
}

// table has rows of cells. A cell may have several lines. The last column takes the rest of the width.
type table struct {
	head  []string
	rows  [][]string
	right []bool // by column: aligned to the right, for numbers
}

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

// table writes t, its columns aligned.
func (p *printer) table(t *table) {
	all := t.rows
	if t.head != nil {
		all = append([][]string{t.head}, t.rows...)
	}
	if len(t.rows) == 0 {
		return
	}
	last := len(all[0]) - 1
	widths := make([]int, last)
	for _, r := range all {
		for i, c := range r[:last] {
			for l := range strings.SplitSeq(c, "\n") {
				widths[i] = max(widths[i], utf8.RuneCountInString(l))
			}
		}
	}
	indent := 0
	for _, w := range widths {
		indent += w + gap
	}
	for _, r := range all {
		p.row(t, r, widths, indent)
	}
}

func (p *printer) row(t *table, cells []string, widths []int, indent int) {
	last := len(cells) - 1
	room, below := 0, false
	if p.width > 0 {
		room = p.width - indent
		if below = room < minField && utf8.RuneCountInString(cells[last]) > room; below {
			room = p.width - 2*gap
		}
	}
	lines := make([][]string, len(cells))
	height := 1
	for i, c := range cells[:last] {
		lines[i] = strings.Split(c, "\n")
		height = max(height, len(lines[i]))
	}
	final := wrap(cells[last], room)
	if !below {
		lines[last] = final
		height = max(height, len(final))
	}
	for y := range height {
		var b strings.Builder
		for i := range cells {
			text := ""
			if y < len(lines[i]) {
				text = lines[i][y]
			}
			if i == last {
				b.WriteString(text)
				break
			}
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(text))
			if i < len(t.right) && t.right[i] {
				b.WriteString(pad + text)
			} else {
				b.WriteString(text + pad)
			}
			b.WriteString(strings.Repeat(" ", gap))
		}
		p.WriteString(strings.TrimRight(b.String(), " ") + "\n")
	}
	if below {
		for _, l := range final {
			p.WriteString(strings.Repeat(" ", 2*gap) + l + "\n")
		}
	}
}

// wrap breaks s at spaces into lines of at most room columns. Longer words stay whole. 0 means no limit. Line breaks in s
// are kept.
func wrap(s string, room int) []string {
	var out []string
	for part := range strings.SplitSeq(s, "\n") {
		if room <= 0 || utf8.RuneCountInString(part) <= room {
			out = append(out, part)
			continue
		}
		cur, n := "", 0
		for w := range strings.FieldsSeq(part) {
			l := utf8.RuneCountInString(w)
			if n > 0 && n+1+l > room {
				out = append(out, cur)
				cur, n = "", 0
			}
			if n > 0 {
				cur, n = cur+" ", n+1
			}
			cur, n = cur+w, n+l
		}
		out = append(out, cur)
	}
	return out
}
