package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// runDir has a folder for each lab, with a folder for each host.
const runDir = "/run/tulle-lab"

const (
	stateFile    = "lab.json"
	stateVersion = 1
)

// state is the state of a lab, the contents of lab.json.
type state struct {
	Version int     `json:"version"`
	Whole   bool    `json:"whole"`  // Up has completed
	Failed  bool    `json:"failed"` // Up failed and kept the lab
	Maker   process `json:"maker"`  // the process that ran Up
	Options Options `json:"options"`
	Hosts   []Host  `json:"hosts"`
	Pods    []Pod   `json:"pods"`
}

func labDir(name string) string { return filepath.Join(runDir, name) }

// save writes the state atomically.
func (s *state) save() error {
	b, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return err
	}
	path := filepath.Join(labDir(s.Options.Name), stateFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// errNoLab is wrapped by the errors about a lab that does not exist.
var errNoLab = errors.New("no such lab")

func loadState(name string) (*state, error) {
	if !nameRule.MatchString(name) {
		return nil, fmt.Errorf("lab name %q: use 1 to 20 of a-z, 0-9 and \"-\", not beginning or ending with \"-\"", name)
	}
	b, err := os.ReadFile(filepath.Join(labDir(name), stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("lab %s: %w; `tulle lab up%s` makes it", name, errNoLab, nameFlag(name))
	} else if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("lab %s: %s: %w; `tulle lab down%s` removes what there is", name, stateFile, err, nameFlag(name))
	}
	if s.Version != stateVersion {
		return nil, fmt.Errorf("lab %s was made by another version of tulle; `tulle lab down%s` removes it", name, nameFlag(name))
	}
	return &s, nil
}

// nameFlag returns the flag that selects the lab of that name on the command line.
func nameFlag(name string) string {
	if name == DefaultName {
		return ""
	}
	return " --name " + name
}

// lock locks the lab's folder, and creates it if necessary. If another process holds the lock, lock returns an error and does
// not wait. The result unlocks.
func lock(name string) (unlock func(), err error) {
	dir := labDir(name)
	for range 100 {
		if err := os.MkdirAll(dir, 0o755); errors.Is(err, os.ErrNotExist) {
			continue // the last lab was removed, and runDir with it
		} else if err != nil {
			return nil, err
		}
		f, err := os.Open(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			return nil, fmt.Errorf("lab %s: another process is building or removing it; wait for that, or choose another --name", name)
		}
		// Down may have removed the folder between open and lock.
		var held, there unix.Stat_t
		if unix.Fstat(int(f.Fd()), &held) == nil && unix.Stat(dir, &there) == nil && held.Ino == there.Ino && held.Dev == there.Dev {
			return func() {
				_ = unix.Flock(int(f.Fd()), unix.LOCK_UN) // closing does not unlock while a child before its execve holds the file, too
				f.Close()
			}, nil
		}
		f.Close()
	}
	return nil, fmt.Errorf("lab %s: cannot lock %s", name, dir)
}

// List returns the sorted names of the labs on this machine, complete or not.
func List() ([]string, error) {
	entries, err := os.ReadDir(runDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && nameRule.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}
