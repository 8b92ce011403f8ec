package main

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
)

// logger is where the mirrors log to: errors are violations, warnings are counted.
type logger struct {
	slog.Handler
	tally *tally
	file  *os.File // nil for none
}

func newLogger(file string, t *tally) (*logger, error) {
	l := &logger{tally: t}
	out, level := io.Discard, slog.LevelWarn
	if file != "" {
		var err error
		if l.file, err = os.Create(file); err != nil {
			return nil, err
		}
		out, level = l.file, slog.LevelDebug
	}
	l.Handler = slog.NewTextHandler(out, &slog.HandlerOptions{Level: level})
	return l, nil
}

// of is one host's.
func (l *logger) of(index int) *logger {
	return &logger{l.WithAttrs([]slog.Attr{slog.Int("host", index)}), l.tally, nil}
}

// Handle looks at a line and writes it.
func (l *logger) Handle(ctx context.Context, r slog.Record) error {
	switch {
	case r.Level >= slog.LevelError:
		text := r.Message
		r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
		l.tally.violate("a mirror logged: %s", text)
	case r.Level >= slog.LevelWarn:
		l.tally.note(func(n *counts) { n.warnings[r.Message]++ })
	}
	return l.Handler.Handle(ctx, r)
}

// dissent notes an answer to a tag that the fleet's record does not give.
func (l *logger) dissent(header http.Header) {
	slog.New(l.Handler).Info("dissent", "digest", header.Get("Docker-Content-Digest"), "cache", header.Get("Cache-Status"), "warning", header.Get("Warning"))
}

func (l *logger) close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}
