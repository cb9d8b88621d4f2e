package config

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"

	yaml "github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// entry is a key of the file: its texts and its line.
type entry struct {
	texts []string
	line  int
}

// parseFile reads a flat mapping of known keys to scalars or lists of scalars. Scalars are taken as written; anchors,
// aliases, tags and merges have no place here, so nothing in a file can grow while it is read.
func parseFile(path string, data []byte) (map[string]entry, error) {
	f, err := parser.ParseBytes(bytes.TrimPrefix(data, []byte("\ufeff")), 0) // some editors begin a file with a byte order mark
	if err != nil {
		return nil, syntaxError(path, data, err)
	}
	out := map[string]entry{}
	docs := 0
	for _, doc := range f.Docs {
		if doc == nil || doc.Body == nil {
			continue
		}
		if docs++; docs > 1 {
			return nil, fmt.Errorf("%s:%d: a second YAML document; one is wanted", path, line(doc.Body))
		}
		var pairs []*ast.MappingValueNode
		switch n := doc.Body.(type) {
		case *ast.MappingNode:
			pairs = n.Values
		case *ast.MappingValueNode:
			pairs = []*ast.MappingValueNode{n}
		case *ast.CommentGroupNode, *ast.NullNode:
			continue
		default:
			return nil, fmt.Errorf("%s:%d: want lines of the form \"key: value\"", path, line(doc.Body))
		}
		for _, p := range pairs {
			if err := addPair(path, out, p); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

func addPair(path string, out map[string]entry, p *ast.MappingValueNode) error {
	at := line(p.Key)
	name := ""
	if tk := p.Key.GetToken(); tk != nil {
		name = tk.Value
	}
	k := find(name)
	if k == nil {
		return fmt.Errorf("%s:%d: unknown key %q; %s", path, at, name, suggest(name))
	}
	if old, twice := out[name]; twice {
		return fmt.Errorf("%s:%d: %s is already set in line %d; keep one of them", path, at, name, old.line)
	}
	texts, err := texts(p.Value, k.list)
	if err != nil {
		return fmt.Errorf("%s:%d: %s %w", path, at, name, err)
	}
	out[name] = entry{texts: texts, line: at}
	return nil
}

// texts reads a scalar or, where list is true, a sequence of scalars.
func texts(n ast.Node, list bool) ([]string, error) {
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		s, err := scalar(n)
		return []string{s}, err
	}
	if !list {
		return nil, fmt.Errorf("wants one value, not a list")
	}
	out := []string{}
	for _, v := range seq.Values {
		s, err := scalar(v)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

func scalar(n ast.Node) (string, error) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, nil
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return strings.TrimSpace(n.GetToken().Value), nil
	case *ast.NullNode, nil:
		return "", fmt.Errorf("has no value; give it one, or delete the line")
	}
	return "", fmt.Errorf("wants plain values, not a %s (text in brackets or with \": \" needs quotes: \"[fd00::1]:7946\")", strings.ToLower(n.Type().String()))
}

func line(n ast.Node) int {
	if tk := n.GetToken(); tk != nil && tk.Position != nil {
		return tk.Position.Line
	}
	return 1
}

// twice is the parser's message about a key that comes again.
var twice = regexp.MustCompile(`^mapping key "(.*)" already defined at \[(\d+):\d+\]$`)

// syntaxError puts the parser's message, which has several lines with an excerpt, into one, and mistakes that are made often into plain words.
func syntaxError(path string, data []byte, err error) error {
	var tk *token.Token
	msg := err.Error()
	if y, ok := errors.AsType[yaml.Error](err); ok {
		tk, msg = y.GetToken(), y.GetMessage()
	}
	msg, _, _ = strings.Cut(msg, "\n")
	if tk == nil || tk.Position == nil {
		return fmt.Errorf("%s: %s; want lines of the form \"key: value\"", path, msg)
	}
	at := tk.Position.Line
	if m := twice.FindStringSubmatch(msg); m != nil {
		return fmt.Errorf("%s:%d: %s is set in line %s already; delete one of the two", path, at, m[1], m[2])
	}
	if lines := bytes.Split(data, []byte("\n")); at >= 1 && at <= len(lines) {
		if text := lines[at-1]; bytes.ContainsRune(text[:len(text)-len(bytes.TrimLeft(text, " \t"))], '\t') {
			return fmt.Errorf("%s:%d: the line begins with a tab; YAML wants spaces there, or nothing", path, at)
		}
	}
	return fmt.Errorf("%s:%d: %s; want lines of the form \"key: value\"", path, at, msg)
}

// suggest names the key that was probably meant.
func suggest(name string) string {
	norm := strings.ToLower(strings.ReplaceAll(name, "-", "_"))
	best := Nearest(norm, func(yield func(string) bool) {
		for _, k := range keys {
			if !yield(k.name) {
				return
			}
		}
	})
	if best == "" {
		return "`tulle agent --help` lists the keys, and so does docs/configuration.md (a package has docs/ in /usr/share/doc/tulle)"
	}
	return fmt.Sprintf("did you mean %s?", best)
}
