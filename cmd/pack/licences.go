package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// accepted are the licences, by their SPDX names, that ask for no more than their text's being passed on.
var accepted = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "Unlicense"}

// excused are modules with another licence than those, and why they may be there all the same.
var excused = map[string]string{
	"github.com/hashicorp/golang-lru/v2": "MPL-2.0", // of each file, not of the whole; unchanged, and its source is the module
}

// phrases tell a licence by words that no other one has, in lower case, without commas. The last ones
// are those of licences that are never accepted, for the message.
var phrases = []struct{ id, has, hasNot string }{
	{"Apache-2.0", "apache license version 2.0 january 2004", ""},
	{"MIT", "permission is hereby granted free of charge to any person obtaining a copy", ""},
	{"BSD-3-Clause", "redistribution and use in source and binary forms", "\x00neither the name"},
	{"BSD-2-Clause", "redistribution and use in source and binary forms", "neither the name"},
	{"ISC", "permission to use copy modify and or distribute this software for any purpose", ""},
	{"ISC", "permission to use copy modify and distribute this software for any purpose", ""},
	{"Unlicense", "this is free and unencumbered software released into the public domain", ""},
	{"MPL-2.0", "mozilla public license version 2.0", ""},
	{"GPL", "gnu general public license", "mozilla public license version 2.0"}, // which names it
	{"LGPL", "gnu lesser general public license", "mozilla public license version 2.0"},
	{"AGPL", "gnu affero general public license", "mozilla public license version 2.0"},
	{"EPL", "eclipse public license", ""},
	{"CDDL", "common development and distribution license", ""},
}

var (
	blanks      = regexp.MustCompile(`[\s*#/,]+`)
	licenceFile = regexp.MustCompile(`(?i)^(un)?(licen[cs]e|copying|notice)([.-].*)?$`)
	noticeFile  = regexp.MustCompile(`(?i)^notice`)
)

// classify returns the SPDX names of the licences that a text contains.
func classify(text []byte) []string {
	plain := blanks.ReplaceAllString(strings.ToLower(string(text)), " ")
	var ids []string
	for _, p := range phrases {
		must, mustHave := strings.CutPrefix(p.hasNot, "\x00")
		if strings.Contains(plain, p.has) && (must == "" || strings.Contains(plain, must) == mustHave) && !slices.Contains(ids, p.id) {
			ids = append(ids, p.id)
		}
	}
	return ids
}

// module is one that the program is made of.
type module struct {
	path, version string
	licence       string            // an SPDX expression
	texts         map[string][]byte // by file, below the module
}

// licences finds out whose work the program contains and under which licences, and writes all of it to a
// file. A licence that is unknown, or asks for more than was agreed to, is an error.
func (r *release) licences() ([]module, error) {
	modules, err := modulesOf("./cmd/breakwater")
	if err != nil {
		return nil, err
	}
	var refused []error
	for i := range modules {
		refused = append(refused, modules[i].judge())
	}
	if err := errors.Join(refused...); err != nil {
		return nil, err
	}
	var own []byte
	if own, err = os.ReadFile("LICENSE"); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "Breakwater %s\n\n%s\n", r.version, own)
	fmt.Fprintf(&out, "It contains these modules for Go, unchanged; their source is to be had by the path and version of each.\n\n")
	for _, m := range modules {
		fmt.Fprintf(&out, "%s %s: %s\n", m.path, m.version, m.licence)
	}
	var texts []string
	holders := map[string][]string{} // of each text
	for _, m := range modules {
		for _, file := range slices.Sorted(maps.Keys(m.texts)) {
			text := string(m.texts[file])
			if holders[text] == nil {
				texts = append(texts, text)
			}
			holders[text] = append(holders[text], m.path+" "+file)
		}
	}
	for _, text := range texts {
		fmt.Fprintf(&out, "\n==== %s\n\n%s\n", strings.Join(holders[text], ", "), strings.TrimRight(text, "\n"))
	}
	return modules, os.WriteFile(filepath.Join(r.dist, "copyright"), out.Bytes(), 0o644)
}

// judge settles the module's licence, and returns an error if it is none that we agreed to.
func (m *module) judge() error {
	var ids []string
	for file, text := range m.texts {
		if noticeFile.MatchString(filepath.Base(file)) {
			continue // who wrote it, not under what
		}
		found := classify(text)
		if len(found) == 0 {
			return fmt.Errorf("%s %s: %s is a licence that is not known here", m.path, m.version, file)
		}
		ids = append(ids, found...)
	}
	if len(ids) == 0 {
		return fmt.Errorf("%s %s has no licence", m.path, m.version)
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	m.licence = strings.Join(ids, " AND ")
	for _, id := range ids {
		if !slices.Contains(accepted, id) && excused[m.path] != id {
			return fmt.Errorf("%s %s is under %s: that is not accepted", m.path, m.version, id)
		}
	}
	return nil
}

// modulesOf returns the modules that a program's packages are from, on any architecture, and Go itself.
func modulesOf(program string) ([]module, error) {
	found := map[string]*module{}
	for _, arch := range architectures {
		cmd := exec.Command("go", "list", "-deps", "-json=Dir,Standard,Module", program)
		cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("go list: %w", err)
		}
		for dec := json.NewDecoder(bytes.NewReader(out)); ; {
			var p struct {
				Dir    string
				Module *struct {
					Path, Version, Dir string
					Main               bool
				}
			}
			if err := dec.Decode(&p); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return nil, err
			}
			if p.Module == nil || p.Module.Main {
				continue
			}
			m := found[p.Module.Path]
			if m == nil {
				m = &module{path: p.Module.Path, version: p.Module.Version, texts: map[string][]byte{}}
				found[m.path] = m
			}
			if err := m.read(p.Module.Dir, p.Dir); err != nil {
				return nil, err
			}
		}
	}
	std := &module{path: "std", version: runtime.Version(), texts: map[string][]byte{}}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err == nil {
		err = std.read(strings.TrimSpace(string(root)), strings.TrimSpace(string(root)))
	}
	if err != nil {
		return nil, err
	}
	modules := []module{*std}
	for _, path := range slices.Sorted(maps.Keys(found)) {
		modules = append(modules, *found[path])
	}
	return modules, nil
}

// read reads the licences that hold for a package: those of its folder and of all above it in the module.
func (m *module) read(root, dir string) error {
	for {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !licenceFile.MatchString(e.Name()) || e.IsDir() || slices.Contains([]string{".go", ".docs"}, filepath.Ext(e.Name())) {
				continue // code, or the licence of a manual
			}
			name, err := filepath.Rel(root, filepath.Join(dir, e.Name()))
			if err == nil && m.texts[name] == nil {
				m.texts[name], err = os.ReadFile(filepath.Join(dir, e.Name()))
			}
			if err != nil {
				return err
			}
		}
		if dir == root || !strings.HasPrefix(dir, root) {
			return nil
		}
		dir = filepath.Dir(dir)
	}
}
