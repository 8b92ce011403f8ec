package storage

import (
	"errors"
	"fmt"
	"testing"
)

func BenchmarkIngest(b *testing.B) {
	d := open(b, b.TempDir())
	raw, dgst := content(64 << 20)
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		in, err := d.Ingest(app, dgst, int64(len(raw)))
		if err != nil {
			b.Fatal(err)
		}
		for p := range bytesIn(raw, 32<<10) {
			write(b, in, p)
		}
		if err := commit(in, anonymous); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBlob(b *testing.B) {
	d := open(b, b.TempDir())
	for name, c := range map[string]Confirmation{"public": anonymous, "private": secret} {
		raw, _ := content(1000)
		dgst := store(b, d, app, raw, c)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				blob, err := d.Blob(app, dgst)
				if err != nil {
					b.Fatal(err)
				}
				_ = blob.Close()
			}
		})
	}
}

func BenchmarkManifest(b *testing.B) {
	d := open(b, b.TempDir())
	m, _ := image(b)
	tag := Tag{Current: Validated{m.Digest, anonymous.At, "u"}}
	if err := errors.Join(d.PutManifest(app, m, anonymous), d.PutTag(app, "latest", tag)); err != nil {
		b.Fatal(err)
	}
	b.Run("by digest", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.Manifest(app, m.Digest); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("by tag", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			t, err := d.Tag(app, "latest")
			if err == nil {
				_, err = d.Manifest(app, t.Current.Digest)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("from the disk", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			d.forget()
			if _, err := d.Manifest(app, m.Digest); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("put", func(b *testing.B) {
		for b.Loop() {
			m, _ := image(b)
			if err := errors.Join(d.PutManifest(app, m, anonymous), d.PutTag(app, "latest", Tag{Current: Validated{m.Digest, anonymous.At, "u"}})); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkExport(b *testing.B) {
	d := open(b, b.TempDir())
	m, _ := image(b)
	if err := d.PutManifest(app, m, anonymous); err != nil {
		b.Fatal(err)
	}
	for n := range 1000 {
		if err := d.PutTag(app, fmt.Sprint("v", n), Tag{Current: Validated{m.Digest, anonymous.At, "u"}}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if err := d.export(); err != nil {
			b.Fatal(err)
		}
	}
}
