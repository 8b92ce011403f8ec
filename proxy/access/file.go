package access

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lookEvery is how often it is looked whether files have changed, when somebody wants what is in them.
	lookEvery = time.Second
	// maxFile bounds what is read: the largest are the names of a large company.
	maxFile = 4 << 20
)

// file is what was made of some files, which belong together. It is made anew when one of them changes;
// if that fails, it stays as it was, and the log says why.
type file[T any] struct {
	names  []string
	read   func() (*T, error)
	logger *slog.Logger

	value  atomic.Pointer[T]
	looked atomic.Int64 // in nanoseconds

	turn sync.Mutex    // held by who looks; nobody who wants the value waits for it
	seen []fs.FileInfo // of the files when they were last read
}

// open reads the files for the first time.
func open[T any](logger *slog.Logger, read func() (*T, error), names ...string) (*file[T], error) {
	f := &file[T]{names: names, read: read, logger: logger}
	return f, f.reload()
}

// get is what is in force.
func (f *file[T]) get() *T {
	now := time.Now().UnixNano()
	if last := f.looked.Load(); (now-last >= int64(lookEvery) || now < last) && f.looked.CompareAndSwap(last, now) && f.turn.TryLock() {
		defer f.turn.Unlock()
		if seen := f.stat(); f.changed(seen) {
			if err := f.make(seen); err != nil {
				f.logger.Error("file not read again; what it said before stays in force", "files", strings.Join(f.names, ", "), "err", err)
			} else {
				f.logger.Info("file has changed and was read again", "files", strings.Join(f.names, ", "))
			}
		}
	}
	return f.value.Load()
}

// reload reads the files now.
func (f *file[T]) reload() error {
	f.turn.Lock()
	defer f.turn.Unlock()
	f.looked.Store(time.Now().UnixNano())
	return f.make(f.stat())
}

// make reads the files, which were seen before: what changes meanwhile is seen to have changed the next time.
func (f *file[T]) make(seen []fs.FileInfo) error {
	f.seen = seen // also if it fails: it is said once
	value, err := f.read()
	if err == nil {
		f.value.Store(value)
	}
	return err
}

// stat has nil for a file that is not there.
func (f *file[T]) stat() []fs.FileInfo {
	seen := make([]fs.FileInfo, len(f.names))
	for i, name := range f.names {
		if info, err := os.Stat(name); err == nil {
			seen[i] = info
		}
	}
	return seen
}

func (f *file[T]) changed(seen []fs.FileInfo) bool {
	for i, now := range seen {
		before := f.seen[i]
		if (now == nil) != (before == nil) {
			return true
		}
		if now != nil && (!os.SameFile(now, before) || !now.ModTime().Equal(before.ModTime()) || now.Size() != before.Size()) {
			return true
		}
	}
	return false
}

// readFile reads a whole file, if it is not too large to be what it should be.
func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(raw) > maxFile {
		err = errors.New("too large")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return raw, nil
}
