package main

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"runtime"
)

// packages writes a deb and an rpm for each architecture, as packaging/nfpm.yaml says, with what the
// program knows of itself: manual pages and completions. nfpm's modules are none of ours.
func (r *release) packages() error {
	if _, err := r.licences(); err != nil {
		return err
	}
	for _, old := range []string{"*.deb", "*.rpm"} {
		files, err := filepath.Glob(filepath.Join(r.dist, old))
		if err != nil {
			return err
		}
		for _, file := range files {
			if err := os.Remove(file); err != nil {
				return err
			}
		}
	}
	for _, arch := range architectures {
		if _, err := r.binary(arch); err != nil {
			return err
		}
	}
	if err := r.generate(filepath.Join(r.dist, "linux-"+runtime.GOARCH, "breakwater")); err != nil {
		return err
	}
	for _, arch := range architectures {
		for _, kind := range []string{"deb", "rpm"} {
			args := []string{"go", "tool", "-modfile=.ci/pack.mod", "nfpm", "package", "--config", "packaging/nfpm.yaml", "--packager", kind, "--target", r.dist}
			if err := r.run([]string{"VERSION=" + r.version, "ARCH=" + arch, "DIST=" + r.dist}, args...); err != nil {
				return err
			}
		}
	}
	return nil
}

// generate has the program write its manual pages and completions, for all architectures.
func (r *release) generate(program string) error {
	man := filepath.Join(r.dist, "man")
	if err := os.RemoveAll(man); err != nil {
		return err
	}
	if err := r.run(nil, program, "man", man); err != nil {
		return err
	}
	pages, err := filepath.Glob(filepath.Join(man, "*.1"))
	if err != nil {
		return err
	}
	for _, page := range pages {
		if err := compressFile(page, page+".gz"); err != nil {
			return err
		}
		if err := os.Remove(page); err != nil {
			return err
		}
	}
	if err := compressFile("CHANGELOG.md", filepath.Join(r.dist, "changelog.gz")); err != nil {
		return err
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if err := r.run(nil, "sh", "-c", `"$0" completion "$1" >"$2"`, program, shell, filepath.Join(r.dist, "completion."+shell)); err != nil {
			return err
		}
	}
	return nil
}

// compressFile writes a file's content to another one.
func compressFile(from, to string) error {
	plain, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	compressed, err := compress(plain)
	if err != nil {
		return err
	}
	return os.WriteFile(to, compressed, 0o644)
}

// compress is gzip, without a name and a time.
func compress(plain []byte) ([]byte, error) {
	var out bytes.Buffer
	zip, err := gzip.NewWriterLevel(&out, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := zip.Write(plain); err != nil {
		return nil, err
	}
	if err := zip.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}
