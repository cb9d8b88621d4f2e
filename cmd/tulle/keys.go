package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tulle-net/tulle/internal/api"
)

func keysCommand() *cobra.Command {
	c := new(client)
	ls := &cobra.Command{
		Use:   "list",
		Short: "List the gossip keys by ID, and how many members have each",
		Args:  exactly(),
		RunE:  ask(c, func(ctx context.Context, a *api.Client, _ []string) (api.KeyList, error) { return a.Keys(ctx) }, printKeys, nil),
	}
	install := &cobra.Command{
		Use:   "install FILE",
		Short: "Install a new key on every member, without using it yet",
		Long: "Install a new key on every member, without using it yet. FILE holds the key in base64, as `tulle keys generate` writes it, or is\n" +
			"the key file of a node that has only this key; \"-\" is standard input. A key is never a command line argument, because other users\n" +
			"can see those.",
		Example: "  tulle keys generate | tulle keys install -",
		Args:    exactly("a file, or -"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return ask(c, func(ctx context.Context, a *api.Client, args []string) (api.KeyResult, error) {
				key, err := readKey(cmd.InOrStdin(), args[0])
				if err != nil {
					return api.KeyResult{}, err
				}
				return a.KeyInstall(ctx, api.KeyRequest{Key: key})
			}, keyDone("installed"), keyOK)(cmd, args)
		},
	}
	use := &cobra.Command{
		Use:   "use ID",
		Short: "Encrypt with this key on every member; refused if one lacks it",
		Args:  exactly("the ID of a key"), ValidArgsFunction: c.keyIDs,
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.KeyResult, error) {
			return a.KeyUse(ctx, api.KeyRequest{ID: args[0]})
		}, keyDone("in use"), keyOK),
	}
	remove := &cobra.Command{
		Use:   "remove ID",
		Short: "Remove a key from every member; refused while one uses it",
		Args:  exactly("the ID of a key"), ValidArgsFunction: c.keyIDs,
		RunE: ask(c, func(ctx context.Context, a *api.Client, args []string) (api.KeyResult, error) {
			return a.KeyRemove(ctx, api.KeyRequest{ID: args[0]})
		}, keyDone("removed"), keyOK),
	}
	generate := &cobra.Command{
		Use:     "generate",
		Short:   "Print a new random key; needs no agent",
		Example: "  (umask 077; tulle keys generate > /etc/tulle/gossip.key)",
		Args:    exactly(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			key := make([]byte, api.KeySize)
			rand.Read(key) // never fails, see crypto/rand
			_, err := fmt.Fprintln(cmd.OutOrStdout(), base64.StdEncoding.EncodeToString(key))
			return err
		},
	}
	cmd := group("keys", "Manage the keys that encrypt gossip", ls, install, use, remove, generate)
	cmd.Long = "Manage the keys that encrypt gossip. To rotate without losing a member:\n\n" +
		"  tulle keys generate | tulle keys install -    every member accepts the new key\n" +
		"  tulle keys list                               until all members have it\n" +
		"  tulle keys use NEW-ID                         every member encrypts with it\n" +
		"  tulle keys remove OLD-ID\n\n" +
		"The exit code is 1 if a member did not follow or is down; it is named. The same command may be given again."
	return c.flags(cmd, changeTimeout)
}

// maxKeyFile is the maximum size of a key file, in bytes.
const maxKeyFile = 4096

func readKey(in io.Reader, path string) ([]byte, error) {
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, usagef("key file: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxKeyFile+1))
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	var keys []string
	for line := range strings.Lines(string(b)) { // as in an agent's key file, into which a rotation writes a comment
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' && !slices.Contains(keys, line) {
			keys = append(keys, line)
		}
	}
	if len(keys) == 1 && len(b) <= maxKeyFile {
		if key, err := base64.StdEncoding.DecodeString(keys[0]); err == nil && len(key) == api.KeySize {
			return key, nil
		}
	}
	if len(keys) > 1 {
		return nil, usagef("key file %s has %d keys; give one with the key to install alone", path, len(keys))
	}
	return nil, usagef("key file %s: want one line with %d bytes in base64; make one with `tulle keys generate`", path, api.KeySize)
}

func printKeys(p *printer, l api.KeyList) {
	if !l.Encrypted {
		p.line("gossip is not encrypted; set gossip_key_file on every node to change that")
		return
	}
	t := table{head: []string{"KEY", "USE", "MEMBERS", "MISSING ON"}}
	for _, k := range l.Keys {
		use := "accepted"
		if k.Primary {
			use = "encrypts"
		}
		t.row(k.ID, use, fmt.Sprintf("%d of %d", k.Members, l.Members), orNone(strings.Join(k.Missing, " ")))
	}
	p.table(&t)
	if l.Answered < l.Members {
		var who []string
		for _, n := range l.Silent {
			who = append(who, nodeRef(n))
		}
		text := fmt.Sprintf("%d of %d members did not answer", l.Members-l.Answered, l.Members)
		if len(who) > 0 {
			text += ": " + strings.Join(who, ", ")
		}
		p.line("%s", text)
	}
}

func keyDone(word string) func(*printer, api.KeyResult) {
	return func(p *printer, r api.KeyResult) {
		p.line("key %s %s on %d of %s", r.ID, word, r.Done, plural(r.Members, "member"))
		t := table{head: []string{"FAILED ON", "REASON"}}
		for _, f := range r.Failed {
			t.row(nodeRef(f.Node), f.Why)
		}
		p.table(&t)
	}
}

func keyOK(r api.KeyResult) bool { return len(r.Failed) == 0 && r.Done == r.Members }

func (c *client) keyIDs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), quickTimeout)
	defer cancel()
	l, err := api.NewClient(c.socket).Keys(ctx)
	var ids []string
	if err == nil && len(args) == 0 {
		for _, k := range l.Keys {
			ids = append(ids, k.ID)
		}
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
