package config

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"
)

const (
	day       = 24 * time.Hour // a unit that time.ParseDuration does not know
	unlimited = "unlimited"
)

// Duration is a span of time that a configuration may leave unset: the zero value says nothing,
// Set(0) says none at all. As text: 1.5s, 72h, 7d, 1d12h, unlimited.
type Duration struct {
	time.Duration
	set bool
}

// Unlimited is longer than anything lasts: a time that is compared with it is always less.
const Unlimited time.Duration = math.MaxInt64

// Set is a Duration that says d, also if that is 0.
func Set(d time.Duration) Duration { return Duration{d, true} }

// IsZero reports whether nothing was said, so that such a Duration is not written out.
func (d Duration) IsZero() bool { return d == Duration{} }

// String is the shortest text that reads back as d, "" if d is not set.
func (d Duration) String() string {
	switch {
	case d.IsZero():
		return ""
	case d.Duration == Unlimited:
		return unlimited
	case d.Duration > 3*day && d.Duration%day == 0:
		return strconv.FormatInt(int64(d.Duration/day), 10) + "d"
	}
	s := d.Duration.String() // such as 72h0m0s
	if rest, ok := strings.CutSuffix(s, "m0s"); ok {
		s = rest + "m"
	}
	if rest, ok := strings.CutSuffix(s, "h0m"); ok {
		s = rest + "h"
	}
	return s
}

// MarshalText is String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what String writes, and whatever time.ParseDuration reads with days before it.
func (d *Duration) UnmarshalText(text []byte) error {
	s := string(text)
	if s == unlimited {
		*d = Set(Unlimited)
		return nil
	}
	bad := fmt.Errorf("%q is not a span of time: write it with its unit, such as 500ms, 1.5s, 72h or 7d, or unlimited", s)
	var span time.Duration
	days, rest, hasDays := strings.Cut(s, "d")
	if hasDays {
		n, err := strconv.ParseFloat(days, 64)
		if !(err == nil && math.Abs(n) < float64(math.MaxInt64/day)) { // NaN too is not below
			return bad
		}
		span = time.Duration(n * float64(day))
	} else {
		rest = s
	}
	if !hasDays || rest != "" {
		more, err := time.ParseDuration(rest)
		if err != nil || (span+more < span) != (more < 0) {
			return bad
		}
		span += more
	}
	*d = Set(span)
	return nil
}

// What Size's zero value means at most.
const (
	autoCapacity = 50 << 30
	autoFree     = 5 << 30
)

// Size is an amount of disk: so many bytes, or a share of the whole disk. The zero value is auto.
// As text: 50GiB, 200GB, 80%, auto.
type Size struct {
	Bytes   int64
	Percent float64
}

// In is the size in bytes on the disk that holds dir, which need not exist yet. Auto is 50 GiB, or
// half of what is free there now if that is less: whoever needs the same answer again, on a disk that
// it has filled since, must write the first one down.
func (s Size) In(dir string) (int64, error) {
	if s.Bytes > 0 {
		return s.Bytes, nil
	}
	var disk syscall.Statfs_t
	err := syscall.Statfs(dir, &disk)
	for errors.Is(err, fs.ErrNotExist) && filepath.Dir(dir) != dir {
		dir = filepath.Dir(dir)
		err = syscall.Statfs(dir, &disk)
	}
	if err != nil {
		return 0, fmt.Errorf("size of the disk that holds %s: %w", dir, err)
	}
	if s.Percent > 0 {
		return int64(float64(disk.Blocks) * float64(disk.Bsize) * s.Percent / 100), nil
	}
	return min(autoCapacity, int64(float64(disk.Bavail)*float64(disk.Bsize)/2)), nil
}

// Free is the size in bytes of a part of the disk that is left free: auto is a twentieth of it, at most
// 5 GiB.
func (s Size) Free(dir string) (int64, error) {
	if s != (Size{}) {
		return s.In(dir)
	}
	twentieth, err := Size{Percent: 5}.In(dir)
	return min(twentieth, autoFree), err
}

// String is the shortest text that reads back as s.
func (s Size) String() string {
	switch {
	case s.Percent != 0:
		return strconv.FormatFloat(s.Percent, 'f', -1, 64) + "%"
	case s.Bytes == 0:
		return "auto"
	}
	n, units := s.Bytes, []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for n%1024 == 0 {
		n, units = n/1024, units[1:]
	}
	return strconv.FormatInt(n, 10) + units[0]
}

// MarshalText is String.
func (s Size) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what String writes, and sizes as go-humanize knows them.
func (s *Size) UnmarshalText(text []byte) error {
	bad := fmt.Errorf("%q is not a size: write bytes with their unit, such as 50GiB or 200GB, a share of the disk, such as 80%%, or auto", text)
	if string(text) == "auto" {
		*s = Size{}
		return nil
	}
	if number, ok := strings.CutSuffix(string(text), "%"); ok {
		percent, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
		if !(err == nil && percent > 0 && percent <= 100) { // NaN too is neither
			return bad
		}
		*s = Size{Percent: percent}
		return nil
	}
	n, err := humanize.ParseBytes(string(text))
	if err != nil || n == 0 || n > math.MaxInt64 {
		return bad
	}
	*s = Size{Bytes: int64(n)}
	return nil
}

// Rate is so many bytes a second; none is off. As text: 8MiB/s, 1GB/s, off.
type Rate int64

const off = "off"

// String is the shortest text that reads back as r.
func (r Rate) String() string {
	if r == 0 {
		return off
	}
	return Size{Bytes: int64(r)}.String() + "/s"
}

// MarshalText is String.
func (r Rate) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what String writes, and sizes as go-humanize knows them, a second.
func (r *Rate) UnmarshalText(text []byte) error {
	if string(text) == off {
		*r = 0
		return nil
	}
	size, ok := strings.CutSuffix(string(text), "/s")
	n, err := humanize.ParseBytes(size)
	if !ok || err != nil || n == 0 || n > math.MaxInt64 {
		return fmt.Errorf("%q is not a rate: write bytes a second with their unit, such as 8MiB/s, or off", text)
	}
	*r = Rate(n)
	return nil
}
