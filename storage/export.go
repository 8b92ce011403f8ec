package storage

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"path"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// exporter says when index.json is next written.
type exporter struct {
	changed atomic.Bool // a tag names something else than index.json says
	next    time.Time   // not before; only for the flush loop

	count, took, pause atomic.Int64 // for Usage
}

// exportIfDue writes index.json within a second of a change, but for no more than a hundredth of the
// time.
func (d *Disk) exportIfDue(now time.Time) {
	if !d.exporter.changed.Load() || now.Before(d.exporter.next) {
		return
	}
	begun, pause := time.Now(), time.Second
	if err := d.export(); err != nil {
		d.log.Warn("cannot write index.json", "err", err)
		pause = time.Minute
	}
	took := time.Since(begun)
	pause = max(pause, 100*took)
	d.exporter.next = time.Now().Add(pause)
	d.exporter.count.Add(1)
	d.exporter.took.Add(int64(took))
	d.exporter.pause.Store(int64(pause))
}

// export writes index.json: every tag, under the name that people type.
func (d *Disk) export() error {
	d.exporter.changed.Store(false)
	file, temporary, err := d.create()
	if err != nil {
		return err
	}
	w := bufio.NewWriter(writer{d.volume, file})
	err = d.writeIndex(w)
	if err == nil {
		err = errors.Join(w.Flush(), d.sync(file))
	}
	if err := d.publish(file, temporary, ispec.ImageIndexFile, err); err != nil {
		d.exporter.changed.Store(true)
		return err
	}
	return nil
}

// writeIndex streams an image index. One that holds a million tags is never in memory.
func (d *Disk) writeIndex(w io.Writer) error {
	if _, err := io.WriteString(w, `{"schemaVersion":2,"mediaType":"`+ispec.MediaTypeImageIndex+`","manifests":[`); err != nil {
		return err
	}
	separator := "\n"
	err := d.eachTag(func(key tagKey) error {
		desc, err := d.describe(key)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		raw, err := json.Marshal(desc)
		if err != nil {
			return err
		}
		_, err = io.WriteString(w, separator+string(raw))
		separator = ",\n"
		return err
	})
	if err != nil {
		return err
	}
	_, err = io.WriteString(w, "\n]}\n")
	return err
}

// describe is the descriptor of what a tag names.
func (d *Disk) describe(key tagKey) (ispec.Descriptor, error) {
	var t Tag
	if err := d.readRecord(key.record(), &t); err != nil {
		return ispec.Descriptor{}, err
	}
	desc := ispec.Descriptor{
		Digest:      t.Current.Digest,
		Annotations: map[string]string{ispec.AnnotationRefName: oci.Reference{Repository: key.repo, Tag: key.tag}.String()},
	}
	var r record
	err := d.readRecord(manifestRecord(key.repo, desc.Digest), &r)
	desc.MediaType, desc.Size = r.MediaType, r.Size
	if errors.Is(err, fs.ErrNotExist) { // stored through another repository
		var m oci.Manifest
		m, err = d.manifest(manifestKey{key.repo, desc.Digest})
		desc.MediaType, desc.Size = m.MediaType, int64(len(m.Raw))
	}
	return desc, err
}

// eachTag walks all tag records.
func (d *Disk) eachTag(do func(tagKey) error) error {
	return d.eachRepository(func(repo oci.Repository, kind string) error {
		if kind != "_tags" {
			return nil
		}
		return d.records.each(path.Join(repo.Registry, repo.Name, kind), func(e fs.DirEntry) error {
			if !oci.ValidTag(e.Name()) {
				return nil
			}
			return do(tagKey{repo, e.Name()})
		})
	})
}
