package machine

import (
	"testing"
	"testing/fstest"
)

// A quota of the process's own control group counts, and those of the groups above it, of either version.
func TestQuota(t *testing.T) {
	const self, v2, v1 = "proc/self/cgroup", "sys/fs/cgroup/", "sys/fs/cgroup/cpu,cpuacct/"
	for name, tc := range map[string]struct {
		files map[string]string
		want  float64
	}{
		"nothing":              {nil, 0},
		"a container":          {map[string]string{self: "0::/\n", v2 + "cpu.max": "150000 100000\n"}, 1.5},
		"without /proc":        {map[string]string{v2 + "cpu.max": "150000 100000\n"}, 1.5},
		"no limit":             {map[string]string{self: "0::/\n", v2 + "cpu.max": "max 100000\n"}, 0},
		"a service":            {map[string]string{self: "0::/system.slice/bench.service\n", v2 + "system.slice/bench.service/cpu.max": "50000 100000\n"}, 0.5},
		"its slice is tighter": {map[string]string{self: "0::/a/b\n", v2 + "a/b/cpu.max": "300000 100000\n", v2 + "a/cpu.max": "200000 100000\n"}, 2},
		"version 1": {map[string]string{
			self: "5:memory:/x\n4:cpu,cpuacct:/x\n", v1 + "x/cpu.cfs_quota_us": "25000\n", v1 + "x/cpu.cfs_period_us": "100000\n",
			v1 + "cpu.cfs_quota_us": "-1\n", v1 + "cpu.cfs_period_us": "100000\n",
		}, 0.25},
		"version 1 in a container": {map[string]string{
			self: "4:cpu,cpuacct:/docker/0123\n", v1 + "cpu.cfs_quota_us": "100000\n", v1 + "cpu.cfs_period_us": "100000\n",
		}, 1},
		"damaged": {map[string]string{self: "x\n0::/\n", v2 + "cpu.max": "lots 0\n"}, 0},
	} {
		root := fstest.MapFS{}
		for file, text := range tc.files {
			root[file] = &fstest.MapFile{Data: []byte(text)}
		}
		if got := quota(root); got != tc.want {
			t.Errorf("%s: %v CPUs, want %v", name, got, tc.want)
		}
	}
}
