package clients

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// holdRun is a Hold that runs, in a synctest bubble.
type holdRun struct {
	*testing.T
	log   said
	stop  context.CancelFunc
	ended chan error
}

func (d *certsD) hold(c Containerd) *holdRun {
	ctx, stop := context.WithCancel(d.Context())
	h := &holdRun{T: d.T, stop: stop, ended: make(chan error, 1)}
	go func() { h.ended <- Hold(ctx, always(c), slog.New(slog.NewTextHandler(&h.log, nil))) }()
	synctest.Wait()
	return h
}

func (h *holdRun) end() {
	h.Helper()
	h.stop()
	if err := <-h.ended; err != nil {
		h.Error(err)
	}
}

func (h *holdRun) says(what string) {
	h.Helper()
	if !strings.Contains(h.log.String(), what) {
		h.Errorf("no %q in the log:\n%s", what, &h.log)
	}
}

// other is a mirror that others hold or write.
func (d *certsD) other() Containerd {
	c := d.containerd()
	c.Mirror = "http://127.0.0.2:5000"
	return c
}

// TestTwoHolders: the second gives up, also by another path to the folder, as containers have.
func TestTwoHolders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		first := d.hold(d.containerd())
		held := d.tree()
		mount, err := os.Open(d.dir)
		if err != nil {
			t.Fatal(err)
		}
		defer mount.Close()
		for _, dir := range []string{d.dir, fmt.Sprintf("/proc/self/fd/%d/", mount.Fd())} {
			c := d.other()
			c.Dir = dir
			second := d.hold(c)
			if err := <-second.ended; !errors.Is(err, errHeld) || !strings.Contains(err.Error(), "for the mirror http://127.0.0.1:5000") {
				t.Errorf("%s is held twice, or by nobody: %v", dir, err)
			}
			second.says("waiting until nobody else")
			d.same("held by the first", d.tree(), held)
		}
		time.Sleep(3 * lookAgain)
		waiting := d.hold(d.other())
		waiting.end()
		first.end()
		if strings.Contains(first.log.String(), "level=WARN") || len(d.tree()) != 1 {
			t.Errorf("left: %v\n%s", d.tree(), &first.log)
		}
	})
}

// TestHoldWaits is an update of the chart: the next pod is there before the last one has undone.
func TestHoldWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		d.put("quay.io/hosts.toml", "mine", 0o600)
		before := d.tree()
		c := d.containerd()
		c.Existing = ExistingReplace
		first := d.hold(c)
		c.Mirror = d.other().Mirror
		second := d.hold(c)
		time.Sleep(patience / 2)
		first.end()
		time.Sleep(askAgain)
		synctest.Wait()
		second.says("containerd is pointed at the mirror")
		if !strings.Contains(d.tree()["quay.io/hosts.toml"], c.Mirror) {
			t.Errorf("held by the second: %v", d.tree())
		}
		second.end()
		d.same("after both", d.tree(), before)
	})
}

// TestHoldAfterKilled: what a holder that was killed has left is the next one's, and --undo's.
func TestHoldAfterKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		killed := d.certified()
		killed.held = true
		killed.Registries["ghcr.io"] = "https://ghcr.io"
		d.must(killed.Write())
		next := d.hold(d.other())
		if tree := d.tree(); tree["ghcr.io"]+tree["quay.io/"+caFile] != "" || !strings.Contains(tree["quay.io/hosts.toml"], d.other().Mirror) {
			t.Errorf("held: %v", tree)
		}
		next.end()
		if tree := d.tree(); len(tree) != 1 {
			t.Errorf("left: %v", tree)
		}
		d.must(killed.Write())
		d.must(Undo(d.dir))
		if tree := d.tree(); len(tree) != 1 {
			t.Errorf("left by undo: %v", tree)
		}
	})
}

// TestHoldBesideWritten: what an administrator has written to stay is there after the hold as before.
func TestHoldBesideWritten(t *testing.T) {
	for _, row := range []struct {
		name     string
		written  func(*certsD) Containerd
		existing Existing
		said     string // of a hold that fails
		during   string // the mirror in quay.io/hosts.toml
	}{
		{"same mirror", (*certsD).containerd, ExistingRefuse, "", "127.0.0.1"},
		{"same mirror, another header", func(d *certsD) Containerd {
			c := d.containerd()
			c.Authorization = "Basic b2xk"
			return c
		}, ExistingReplace, "", "127.0.0.1"},
		{"another mirror", (*certsD).other, ExistingRefuse, "is there to stay, for another mirror", "127.0.0.2"},
		{"another mirror, replaced", (*certsD).other, ExistingReplace, "", "127.0.0.1"},
		{"another mirror, kept", (*certsD).other, ExistingKeep, "", "127.0.0.2"},
		{"another mirror with certificates, replaced", func(d *certsD) Containerd {
			c := d.certified()
			c.Mirror = "https://127.0.0.2:5000"
			return c
		}, ExistingReplace, "", "127.0.0.1"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newCertsD(t)
				written := row.written(d)
				delete(written.Registries, "docker.io")
				written.Registries["ghcr.io"] = "https://ghcr.io"
				d.must(written.Write())
				before := d.tree()
				c := d.containerd()
				c.Existing = row.existing
				h := d.hold(c)
				time.Sleep(2 * lookAgain)
				synctest.Wait()
				if tree := d.tree(); !strings.Contains(tree["quay.io/hosts.toml"], row.during) || tree["ghcr.io/hosts.toml"] != before["ghcr.io/hosts.toml"] {
					t.Errorf("during: %v", tree)
				}
				if row.said == "" {
					h.end()
				} else if err := <-h.ended; err == nil || !strings.Contains(err.Error(), row.said) {
					t.Errorf("%v, want %q", err, row.said)
				}
				d.same("after it", d.tree(), before)
			})
		})
	}
}

// TestWriteBesideHold: an administrator writes, and undoes, while another mirror holds the folder.
func TestWriteBesideHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		h := d.hold(d.containerd())
		held := d.tree()
		done, err := Undo(d.dir)
		d.same("undo of what is held", d.must(done, err), []string{"docker.io keep", "quay.io keep"})
		if !strings.Contains(done[0].Note, "is held for the mirror http://127.0.0.1:5000") {
			t.Errorf("note: %q", done[0].Note)
		}
		d.same("held", d.tree(), held)
		c := d.other()
		delete(c.Registries, "docker.io")
		d.same("plan", d.must(c.Plan()), []string{"quay.io update"})
		d.same("write", d.must(c.Write()), []string{"quay.io update"})
		written := d.tree()
		time.Sleep(2 * lookAgain)
		synctest.Wait()
		d.same("looked at", d.tree(), written)
		h.says("is there to stay, for another mirror")
		h.end()
		delete(written, "docker.io")
		delete(written, "docker.io/hosts.toml")
		d.same("after the hold", d.tree(), written)
		d.same("undo", d.must(Undo(d.dir)), []string{"quay.io remove"})
	})
}

// TestHoldOfAFolderMadeAnew: another holder has been sooner in it.
func TestHoldOfAFolderMadeAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		first := d.hold(d.containerd())
		if err := os.RemoveAll(d.dir); err != nil {
			t.Fatal(err)
		}
		second := d.hold(d.other())
		held := d.tree()
		time.Sleep(2 * lookAgain)
		synctest.Wait()
		d.same("held by the second", d.tree(), held)
		first.says("level=ERROR")
		first.stop()
		if err := <-first.ended; !errors.Is(err, errHeld) {
			t.Error(err)
		}
		d.same("held by the second", d.tree(), held)
		second.end()
		if entries, err := filepath.Glob(d.dir + "/*"); err != nil || len(entries) > 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
	})
}

// TestHoldAfterHalfAReplacement: a holder was killed while it put aside what was written to stay.
func TestHoldAfterHalfAReplacement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		d.must(d.other().Write())
		before := d.tree()
		file := filepath.Join(d.dir, "quay.io/hosts.toml")
		if err := os.Link(file, file+keptSuffix); err != nil {
			t.Fatal(err)
		}
		c := d.containerd()
		c.Existing = ExistingKeep
		d.hold(c).end()
		d.same("after the next", d.tree(), before)
	})
}

// TestCheck asks by the eyes of who is there to mend it, and changes nothing.
func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newCertsD(t)
		c := d.certified()
		is := func(what string, c Containerd, want ...string) {
			t.Helper()
			got := []string{}
			before, _ := os.ReadDir(d.dir)
			todo, err := c.Check()
			if err != nil {
				t.Fatal(err)
			}
			for _, change := range todo {
				if !change.Settled() {
					got = append(got, d.words([]Change{change})...)
				}
			}
			d.same(what, got, append([]string{}, want...))
			if after, _ := os.ReadDir(d.dir); len(after) != len(before) {
				t.Errorf("%s: a check has changed something: %v, %v", what, before, after)
			}
		}
		ca, client := "quay.io/"+caFile, "quay.io/"+clientFile
		is("nothing", c, ca+" write", client+" write", "quay.io write")
		h := d.hold(c)
		is("held", c)
		renewed, another := c, d.other()
		renewed.Authorization = "Basic bmV3"
		is("held, and renewed since", renewed, "quay.io update")
		is("held for another mirror", another, "docker.io write", "quay.io update", client+" remove", ca+" remove")
		if err := os.Remove(filepath.Join(d.dir, client)); err != nil {
			t.Fatal(err)
		}
		is("held, and one is gone", c, client+" write")
		time.Sleep(lookAgain)
		synctest.Wait()
		is("held again", c)
		d.put("quay.io/hosts.toml", "mine", 0o644)
		is("replaced by somebody", c, "quay.io refuse")
		kept := c
		kept.Existing = ExistingKeep
		is("which is kept", kept)
		h.end()
		if err := os.RemoveAll(d.dir); err != nil {
			t.Fatal(err)
		}
		d.must(renewed.Write())
		is("written", renewed)
		is("written, and otherwise", c, "quay.io update")
		h = d.hold(c)
		is("written, and left by the holder", c)
		h.end()
		leftover := c
		leftover.held = true
		d.must(Undo(d.dir))
		d.must(leftover.Write())
		is("left by a holder that was killed", c, ca+" update", client+" update", "quay.io update")
	})
}
