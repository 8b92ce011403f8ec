//go:build linux

package config

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// lentFile names the file that the test's own second run looks at, with the groups that it has then.
const lentFile = "CONFIG_TEST_LENT"

// TestLentSecrets mounts a secret as a kubelet does for a pod with an fsGroup: root's, behind links, for a
// group of ours to read.
func TestLentSecrets(t *testing.T) {
	if file := os.Getenv(lentFile); file != "" {
		if err := checkSecret(file); err != nil {
			t.Fatal(err)
		}
		return
	}
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("only root can give files away")
		}
		t.Skip("only root can give files away") // in CI that is a failure
	}
	const group, refused = 65532, "is open to others than its owner"
	for name, tt := range map[string]struct {
		owner, group int
		mode         os.FileMode
		ours         []uint32
		err          string
	}{
		"a kubelet's":      {0, group, 0o440, []uint32{1, group}, ""},
		"with more":        {0, group, 0o640, []uint32{group}, ""},
		"not our group":    {0, group, 0o440, []uint32{1}, refused},
		"no groups":        {0, group, 0o440, nil, refused},
		"somebody's":       {group, group, 0o440, []uint32{group}, refused},
		"root's own group": {0, 0, 0o440, []uint32{0, group}, refused},
		"group may write":  {0, group, 0o460, []uint32{group}, refused},
		"group may run":    {0, group, 0o450, []uint32{group}, refused},
		"everybody's":      {0, group, 0o444, []uint32{group}, refused},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, "..2026_01"), 0o750); err != nil {
				t.Fatal(err)
			}
			secret := filepath.Join(dir, "..2026_01", "password")
			for _, act := range []error{
				os.WriteFile(secret, []byte("hunter2"), 0o600), os.Chown(secret, tt.owner, tt.group), os.Chmod(secret, tt.mode),
				os.Symlink("..2026_01", filepath.Join(dir, "..data")), os.Symlink("..data/password", filepath.Join(dir, "password")),
			} {
				if act != nil {
					t.Fatal(act)
				}
			}
			cmd := exec.Command(os.Args[0], "-test.run=^TestLentSecrets$", "-test.count=1")
			cmd.Env = append(os.Environ(), lentFile+"="+filepath.Join(dir, "password"))
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Groups: tt.ours}}
			out, err := cmd.CombinedOutput()
			if (err == nil) != (tt.err == "") || !strings.Contains(string(out), tt.err) {
				t.Errorf("%v: %s, want %q", err, out, tt.err)
			}
		})
	}
}
