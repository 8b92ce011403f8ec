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

// Hold writes, and undoes that when ctx ends. Meanwhile it writes again what vanishes; what others put
// there is theirs. It returns early only if it cannot write at first, or if Dir is a mount of a folder that was
// deleted: containerd reads another one by now, which a container gets when it is started again.
func (c Containerd) Hold(ctx context.Context, logger *slog.Logger) error {
	done, err := c.Write()
	report(logger, done)
	if err != nil {
		_, undone := Undo(c.Dir)
		return errors.Join(err, undone)
	}
	logger.Info("containerd is pointed at the mirror", "mirror", c.Mirror, "files", len(done))
	h := holding{logger: logger, left: map[string]bool{}}
	for _, change := range done {
		h.left[change.Path] = change.Act == Keep
	}
	c.Existing = ExistingKeep
	ticker := time.NewTicker(lookAgain)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if isDeleted(c.Dir) {
				return fmt.Errorf("%s was deleted, and is only here still because it is mounted: start this again", c.Dir)
			}
			h.again(c)
		case <-ctx.Done():
			done, err := Undo(c.Dir)
			report(logger, done)
			if err == nil {
				logger.Info("containerd is as it was before")
			}
			return err
		}
	}
}

// holding is what has been said already.
type holding struct {
	logger *slog.Logger
	left   map[string]bool // paths
	failed string
}

func (h *holding) again(c Containerd) {
	done, err := c.Write()
	for _, change := range done {
		left := change.Act == Keep
		if change.Act != Unchanged && (!left || !h.left[change.Path]) {
			h.logger.Warn("a file of containerd's has changed", "path", change.Path, "act", change.Act, "note", change.Note)
		}
		h.left[change.Path] = left
	}
	failed := ""
	if err != nil {
		failed = err.Error()
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
