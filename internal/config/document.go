package config

import (
	"cmp"
	"fmt"
	"strings"
)

// Reference is docs/configuration.md: the table as a page for people. `go test ./internal/config -update` writes it.
func Reference() string {
	var b strings.Builder
	b.WriteString(referenceHead)
	b.WriteString("| key in the file | flag | default | live | what it is |\n|---|---|---|---|---|\n")
	for _, k := range keys {
		live := ""
		if k.live {
			live = "yes"
		}
		def := ""
		if k.def != "" {
			def = "`" + k.def + "`"
		}
		fmt.Fprintf(&b, "| [`%s`](#%s) | `--%s` | %s | %s | %s |\n", k.name, k.name, k.flag(), def, live, cell(k.help))
	}
	for _, k := range keys {
		fmt.Fprintf(&b, "\n## %s\n\n", k.name)
		switch {
		case k.kind == kindBootstrap:
			fmt.Fprintf(&b, "`%s: %s` or `--%s`", k.name, k.arg, k.flag())
		case k.kind == kindBool:
			fmt.Fprintf(&b, "`%s: %s` or `--%s[=%s]`", k.name, k.arg, k.flag(), k.arg)
		default:
			fmt.Fprintf(&b, "`%s: %s` or `--%s %s`", k.name, cmp.Or(fileForm(&k), k.arg), k.flag(), k.arg)
		}
		if k.def != "" {
			fmt.Fprintf(&b, ", default `%s`", k.def)
		}
		fmt.Fprintf(&b, "\n\n%s.", sentence(k.help))
		if k.doc != "" {
			b.WriteString(" " + k.doc)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// fileForm shows a repeatable key as the list that it is in the file.
func fileForm(k *key) string {
	if k.list && !strings.Contains(k.arg, ",") {
		return "[" + k.arg + ", …]"
	}
	return ""
}

func sentence(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

func cell(s string) string { return strings.ReplaceAll(s, "|", "\\|") }

const referenceHead = `# Configuration

<!-- Made by ` + "`go test ./internal/config -update`" + ` out of internal/config/keys.go. Do not edit. -->

` + "`tulle agent`" + ` reads flags and ` + "`" + DefaultFile + "`" + ` (` + "`--config`" + ` names another file; the default one may be missing). The file is
YAML: one line ` + "`key: value`" + ` a key, lists as ` + "`[a, b]`" + ` or one ` + "`- item`" + ` a line, or with commas. Keys are those of the flags, written with ` + "`_`" + `.
A flag replaces what the file says. Unknown keys, keys given twice and values of the wrong shape are refused with their line.

Every node can have the same file:

` + "```yaml" + `
bootstrap: node-a              # the one node that starts the cluster
join: [node-a, node-b]         # some nodes that are usually there
cluster_cidr: [10.244.0.0/16, "fd00:10:244::/48"]
gossip_key_file: /etc/tulle/gossip.key
` + "```" + `

Keys marked *live* change on ` + "`systemctl reload tulle`" + ` (SIGHUP) or ` + "`tulle reload`" + `, which also says what needs a restart. All else is
read at start; a restart keeps routes, pods and their addresses.

`
