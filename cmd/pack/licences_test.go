package main

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestLicencesOfTheProgram reads those of all that the program is made of. Each is accepted.
func TestLicencesOfTheProgram(t *testing.T) {
	t.Chdir("../..")
	r := &release{dist: t.TempDir(), version: "1.2.3"}
	modules, err := r.licences()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(r.dist, "copyright"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Breakwater 1.2.3", "github.com/sony/gobreaker/v2 v2.4.0: MIT\n", "\nstd go", "Copyright 2009 The Go Authors", "github.com/hashicorp/golang-lru/v2 v2.0.7: MPL-2.0\n"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the list has no %q", want)
		}
	}
	for _, module := range modules {
		if strings.HasSuffix(module.path, "registrytest") || strings.HasPrefix(module.path, "github.com/google/go-cmp") {
			t.Errorf("%s is for tests only", module.path)
		}
	}
}

func TestJudge(t *testing.T) {
	const mit, bsd, gpl = "Permission is hereby granted, free of charge, to any\n// person obtaining a copy", "Redistribution and use in source and binary forms", "GNU GENERAL PUBLIC LICENSE\nVersion 3"
	const mpl = "Mozilla Public License, version 2.0 … \"Secondary License\" means the GNU General Public License, Version 2.0"
	for _, row := range []struct {
		name  string
		path  string
		texts map[string]string
		want  string // "" is refused
	}{
		{"one", "a", map[string]string{"LICENSE": mit}, "MIT"},
		{"two in one file", "a", map[string]string{"LICENSE": mit + "\n" + bsd + " … Neither the name of"}, "BSD-3-Clause AND MIT"},
		{"two clauses", "a", map[string]string{"LICENSE": bsd}, "BSD-2-Clause"},
		{"one below another", "a", map[string]string{"COPYING": mit, "internal/LICENSE": "Apache License\n   Version 2.0, January 2004"}, "Apache-2.0 AND MIT"},
		{"none", "a", nil, ""},
		{"a notice alone", "a", map[string]string{"NOTICE": mit}, ""},
		{"unknown", "a", map[string]string{"LICENSE": "All rights reserved."}, ""},
		{"unknown below a known one", "a", map[string]string{"LICENSE": mit, "x/LICENSE": "All rights reserved."}, ""},
		{"copyleft", "a", map[string]string{"LICENSE": gpl}, ""},
		{"copyleft beside another", "a", map[string]string{"LICENSE": mit + gpl}, ""},
		{"of each file", "a", map[string]string{"LICENSE": mpl}, ""},
		{"of each file, excused", "github.com/hashicorp/golang-lru/v2", map[string]string{"LICENSE": mpl}, "MPL-2.0"},
		{"more than it is excused for", "github.com/hashicorp/golang-lru/v2", map[string]string{"LICENSE": mpl, "COPYING": gpl}, ""},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := module{path: row.path, version: "v1.0.0", texts: map[string][]byte{}}
			for file, text := range row.texts {
				m.texts[file] = []byte(text)
			}
			err := m.judge()
			if row.want == "" && err == nil || row.want != "" && (err != nil || m.licence != row.want) {
				t.Errorf("%q, %v, want %q", m.licence, err, row.want)
			}
		})
	}
}

// TestCertificates has the image's file read as the program does.
func TestCertificates(t *testing.T) {
	pool := x509.NewCertPool()
	if text := certificates(); !pool.AppendCertsFromPEM(text) || bytes.Count(text, []byte("BEGIN CERTIFICATE")) < 100 {
		t.Errorf("%d bytes of certificates", len(text))
	}
}

func TestNothingElseIsMade(t *testing.T) {
	for _, what := range [][]string{nil, {"everything"}} {
		if err := pack(t.TempDir(), what); err == nil {
			t.Errorf("%v was made", what)
		}
	}
}
