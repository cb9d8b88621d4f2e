package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/tulle-net/tulle/internal/api"
)

// none is shown for a missing value.
const none = "–"

func orNone(s string) string {
	if s == "" {
		return none
	}
	return s
}

// since is the time from t to now, in its two largest units.
func (p *printer) since(t time.Time) string {
	if t.IsZero() {
		return none
	}
	return age(p.now.Sub(t))
}

func age(d time.Duration) string {
	s := int64(max(d, 0) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 86400:
		return fmt.Sprintf("%dh%02dm", s/3600, s%3600/60)
	}
	return fmt.Sprintf("%dd%02dh", s/86400, s%86400/3600)
}

// rtt shows microseconds with three digits.
func rtt(us int64) string {
	switch {
	case us <= 0:
		return none
	case us < 1000:
		return fmt.Sprintf("%dµs", us)
	case us < 100_000:
		return fmt.Sprintf("%.3gms", float64(us)/1e3)
	case us < 1_000_000:
		return fmt.Sprintf("%dms", us/1000)
	}
	return fmt.Sprintf("%.3gs", float64(us)/1e6)
}

func percent(share float64) string {
	switch {
	case share <= 0:
		return "0%"
	case share < 0.01:
		return "<1%"
	}
	return fmt.Sprintf("%.0f%%", share*100)
}

func mtu(n int) string {
	if n == 0 {
		return none
	}
	return strconv.Itoa(n)
}

// count shows a large number with three digits and a decimal unit (k, M, …).
func count(n uint64) string { return scaled(n, 1000, "", "k", "M", "G", "T", "P", "E") }

// byteSize shows a size in decimal units.
func byteSize(n uint64) string {
	return scaled(n, 1000, " B", " kB", " MB", " GB", " TB", " PB", " EB")
}

func scaled(n uint64, base float64, units ...string) string {
	if n < uint64(base) {
		return strconv.FormatUint(n, 10) + units[0]
	}
	f, i := float64(n), 0
	for f >= base*0.9995 && i < len(units)-1 {
		f, i = f/base, i+1
	}
	return strings.TrimSuffix(fmt.Sprintf("%.3g", f), ".0") + units[i]
}

// size shows how many addresses a block has for pods; the API caps that number.
func size(b api.Block) string {
	if b.Size >= api.MaxCount {
		return fmt.Sprintf("2^%d", b.Prefix.Addr().BitLen()-b.Prefix.Bits())
	}
	return strconv.FormatUint(b.Size, 10)
}

// list joins the texts of v.
func list[T fmt.Stringer](v []T, sep string) string {
	s := make([]string, len(v))
	for i := range v {
		s[i] = v[i].String()
	}
	return strings.Join(s, sep)
}

// plural counts things: "1 peer", "2 peers".
func plural(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}

func short(id string) string { return id[:min(8, len(id))] }

func nodeRef(n api.NodeRef) string {
	switch {
	case n.Name == "":
		return orNone(short(n.ID))
	case n.ID == "":
		return n.Name
	}
	return fmt.Sprintf("%s (%s)", n.Name, short(n.ID))
}
