package api

import "runtime/debug"

// version is set by the linker in releases: -X github.com/tulle-net/tulle/internal/api.version=v1.2.3
var version string

// Version returns the version of this program: that set by the linker, else the module's version, else the commit of the
// build, with "-dirty" if files had been modified.
func Version() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	rev, dirty := "", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			rev = s.Value[:min(12, len(s.Value))]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	if rev == "" {
		return "devel"
	}
	return rev + dirty
}
