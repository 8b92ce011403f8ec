package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// place is where a field was set: in a file, or by a variable or flag, which have no line.
type place struct {
	source       string
	line, column int
}

func (p place) String() string {
	if p.line == 0 {
		return p.source
	}
	return fmt.Sprintf("%s:%d:%d", p.source, p.line, p.column)
}

// problem is one mistake: where, in which field, and what to do about it.
type problem struct {
	place place
	path  string
	text  string
}

func (p problem) Error() string {
	var parts []string
	for _, part := range []string{p.place.String(), p.path, p.text} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}

// problems gathers mistakes. A field's path is its keys joined by dots, with [0] behind a list's name.
type problems struct {
	places  map[string]place // of each field that was set, by path
	refused map[string]bool  // paths of which enough was said: their values are not the user's
	found   []problem
}

func newProblems() *problems {
	return &problems{places: map[string]place{}, refused: map[string]bool{}}
}

// add notes a problem with the field at path. Its place is the field's own or, if nobody set it, that
// of the nearest field which holds it.
func (p *problems) add(path, format string, args ...any) {
	holder := path
	for p.places[holder] == (place{}) && holder != "" {
		holder = parent(holder)
	}
	p.addAt(p.places[holder], path, format, args...)
}

// addAt notes a problem at a place that is not the field's own.
func (p *problems) addAt(place place, path, format string, args ...any) {
	for at := path; at != ""; at = parent(at) {
		if p.refused[at] {
			return
		}
	}
	p.found = append(p.found, problem{place, path, fmt.Sprintf(format, args...)})
}

// refuse silences all that is still to be said of path and what lies below it.
func (p *problems) refuse(path string) { p.refused[path] = true }

// err joins what was found, in the order of the file; nil if that is nothing.
func (p *problems) err() error {
	slices.SortStableFunc(p.found, func(a, b problem) int {
		return cmp.Or(cmp.Compare(a.place.line, b.place.line), cmp.Compare(a.place.column, b.place.column))
	})
	var errs []error
	for _, found := range p.found {
		errs = append(errs, found)
	}
	return errors.Join(errs...)
}

// parent cuts the last key off a path. A name with dots takes several cuts, past paths of no field.
func parent(path string) string { return path[:max(0, strings.LastIndexAny(path, ".["))] }
