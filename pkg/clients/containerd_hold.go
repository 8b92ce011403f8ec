package clients

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// lookAgain is how often a held folder is looked at. k3s writes its files anew at each start: it removes the
// folders of the registries that its registries.yaml names with all that is in them, and before it looked
// whose they are, the folder of all registries (k3s, pkg/agent/containerd, writeContainerdHosts).
const lookAgain = 30 * time.Second

// The next holder of a folder waits so long for the one before it: a pod may be there already while the one that it
// replaces ends. Whoever starts it starts it again.
const (
	patience = 10 * time.Second
	askAgain = 200 * time.Millisecond
)

// Hold writes what wanted says, and undoes that when ctx ends. Meanwhile it asks wanted anew at each look: secrets are
// rotated and certificates renewed. What wanted cannot say, or says wrongly, changes nothing. Dir and Mirror are the
// same each time. It writes again what vanishes; what others put there is theirs, and what Write has written stays.
// It returns early only if it cannot write at first, as when another one holds Dir and goes on, or if Dir is a mount of
// a folder that was deleted: containerd reads another one by now, which a container gets when it is started again.
func Hold(ctx context.Context, wanted func() (Containerd, error), logger *slog.Logger) error {
	c, err := wanted()
	if err != nil {
		return err
	}
	c.held = true
	h := holding{c: c, wanted: wanted, logger: logger, left: map[string]bool{}}
	defer func() { _ = h.lock.Close() }()
	done, err := h.begin(ctx)
	report(logger, done)
	switch {
	case errors.Is(err, errHeld) && ctx.Err() != nil:
		return nil
	case errors.Is(err, errHeld):
		return err
	case err != nil:
		_, undone := h.undo()
		return errors.Join(err, undone)
	}
	logger.Info("containerd is pointed at the mirror", "mirror", c.Mirror, "files", len(done))
	for _, change := range done {
		h.left[change.Path] = change.Act == Keep
	}
	h.c.Existing = ExistingKeep
	ticker := time.NewTicker(lookAgain)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if isDeleted(c.Dir) {
				return fmt.Errorf("%s was deleted, and is only here still because it is mounted: start this again", c.Dir)
			}
			h.renew()
			h.again()
		case <-ctx.Done():
			done, err := h.undo()
			report(logger, done)
			if err == nil {
				logger.Info("containerd is as it was before")
			}
			return err
		}
	}
}

// holding is what is held, and what has been said already.
type holding struct {
	c       Containerd
	wanted  func() (Containerd, error)
	logger  *slog.Logger
	lock    *os.File        // the folder, nil before it is held
	renewed bool            // what the files are made of, and not yet all files
	left    map[string]bool // paths
	unread  string
	failed  string
}

// hold has the folder held, which may be another one than before.
func (h *holding) hold(root *os.Root) (err error) {
	h.lock, err = hold(root, h.lock)
	return err
}

// begin writes for the first time, once nobody else holds the folder.
func (h *holding) begin(ctx context.Context) ([]Change, error) {
	patient, end := context.WithTimeout(ctx, patience)
	defer end()
	ticker := time.NewTicker(askAgain)
	defer ticker.Stop()
	for said := false; ; said = true {
		done, err := h.c.write(h.hold)
		if !errors.Is(err, errHeld) {
			return done, err
		}
		if !said {
			h.logger.Info("waiting until nobody else holds containerd's files", "err", err)
		}
		select {
		case <-ticker.C:
		case <-patient.Done():
			return nil, err
		}
	}
}

// undo restores what was there before this began. A file that is not ours may be one that is only half replaced.
func (h *holding) undo() ([]Change, error) {
	return undo(h.c.Dir, func(root *os.Root) (func(place) bool, error) {
		return func(p place) bool { return !p.ours || p.interrupted() || heldFor(p.text) == h.c.Mirror }, h.hold(root)
	})
}

// renew takes over what is wanted by now. A Secret's mount may be looked at just while it is swapped, and half of a
// pair is worse than an old one.
func (h *holding) renew() {
	next, err := h.wanted()
	if err == nil {
		err = next.check()
	}
	if err != nil {
		if err.Error() != h.unread {
			h.logger.Warn("what containerd is told cannot be read anew; what was read before holds; tried again each 30 s", "err", err)
		}
		h.unread = err.Error()
		return
	}
	h.unread = ""
	for _, part := range []struct{ was, is, changed string }{
		{h.c.Authorization, next.Authorization, "the authorization has changed"},
		{h.c.CA, next.CA, "the authority's certificates have changed"},
		{h.c.Client, next.Client, "the client's certificate has changed"},
	} {
		if part.is != part.was {
			h.logger.Info(part.changed)
			h.renewed = true
		}
	}
	next.Existing, next.held = ExistingKeep, true
	h.c = next
}

func (h *holding) again() {
	done, err := h.c.write(h.hold)
	for _, change := range done {
		left := change.Act == Keep
		switch {
		case h.renewed && change.Act == Update:
			report(h.logger, []Change{change})
		case change.Act != Unchanged && (!left || !h.left[change.Path]):
			h.logger.Warn("a file of containerd's has changed", "path", change.Path, "act", change.Act, "note", change.Note)
		}
		h.left[change.Path] = left
	}
	failed := ""
	if err != nil {
		failed = err.Error()
	} else {
		h.renewed = false
	}
	if failed != h.failed && err != nil {
		h.logger.Error("containerd's files cannot be looked after; tried again each 30 s", "err", err)
	}
	h.failed = failed
}

// isDeleted reports whether a folder has no name any more.
func isDeleted(dir string) bool {
	info, err := os.Stat(dir)
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && stat.Nlink == 0
}

func report(logger *slog.Logger, done []Change) {
	for _, change := range done {
		logger.Info("containerd's file", "path", change.Path, "act", change.Act, "note", change.Note)
	}
}
