package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// A pod may go while the agent is down: a container engine has to be able to remove a container at any time. Then a record
// stays beside the socket, one file a pod, named by a hash of its ID and holding the ID. The agent reads the records when it
// starts and every half a minute, and an allocation for the same ID reads its own. After a reboot they are gone with /run, and
// the agent finds that the pods are.

// FreeOrRecord gives a pod's addresses back; if the agent does not answer, or cannot do it now, it leaves a record that the
// agent honours later. It reports whether it did so. The error is that nothing of this could be done. An ID that is none, one
// that is too long for instance, was refused when it asked for addresses: it has none.
func (c *Client) FreeOrRecord(ctx context.Context, id string) (recorded bool, err error) {
	_, err = c.Free(ctx, FreeRequest{ID: id})
	if err == nil || CodeOf(err) == CodeUsage {
		return false, nil
	}
	if werr := writeFreed(c.socket, id); werr != nil {
		return false, errors.Join(err, werr)
	}
	return true, nil
}

func freedDir(socket string) string { return filepath.Join(filepath.Dir(socket), "freed") }

func freedFile(socket, id string) string {
	sum := sha256.Sum256([]byte(id))
	return filepath.Join(freedDir(socket), hex.EncodeToString(sum[:16]))
}

// writeFreed writes a record as a whole: the agent may read at any moment.
func writeFreed(socket, id string) error {
	if err := os.MkdirAll(freedDir(socket), 0o755); err != nil {
		return fmt.Errorf("a record for the agent: %w", err)
	}
	f, err := os.CreateTemp(freedDir(socket), ".new-*")
	if err != nil {
		return fmt.Errorf("a record for the agent: %w", err)
	}
	_, err = f.WriteString(id)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), freedFile(socket, id))
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("a record for the agent: %w", err)
	}
	return nil
}

// maxFreed bounds how many records are read at once; the rest are next time's.
const maxFreed = 4096

// Freed reads the records beside a socket: the IDs of pods that are gone. Damaged ones are removed.
func Freed(socket string) ([]string, error) {
	d, err := os.Open(freedDir(socket))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("records of pods that are gone: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(maxFreed)
	if len(names) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("records of pods that are gone: %w", err)
	}
	var out []string
	for _, name := range names {
		path := filepath.Join(freedDir(socket), name)
		b, err := os.ReadFile(path)
		if name[0] == '.' || err != nil {
			continue // being written, or gone meanwhile
		}
		if id := string(b); path == freedFile(socket, id) && (FreeRequest{ID: id}).validate() == nil {
			out = append(out, id)
		} else {
			os.Remove(path)
		}
	}
	return out, nil
}

// IsFreed reports whether there is a record for this ID.
func IsFreed(socket, id string) bool {
	_, err := os.Lstat(freedFile(socket, id))
	return err == nil
}

// ForgetFreed removes a record that was honoured.
func ForgetFreed(socket, id string) error {
	if err := os.Remove(freedFile(socket, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("a record of a pod that is gone: %w", err)
	}
	return nil
}
