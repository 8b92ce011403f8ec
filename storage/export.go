package storage

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"

	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// exporter says when index.json is next written.
type exporter struct {
	changed atomic.Bool // a tag names something else than index.json says
	next    time.Time   // not before; only for the flush loop
	begun   bool        // it was written since the start, too; what the last process wrote may be old

	count, took, pause atomic.Int64 // for Usage
}

// exportIfDue writes index.json within a second of a change, but for no more than a hundredth of the
// time.
func (d *Disk) exportIfDue(now time.Time) {
	if !d.exporter.changed.Load() && d.exporter.begun || now.Before(d.exporter.next) || !d.index.Built() {
		return
	}
	d.exporter.begun = true
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
	err := d.index.Named(func(n named) error {
		raw, err := json.Marshal(ispec.Descriptor{
			MediaType:   n.mediaType,
			Digest:      n.dgst,
			Size:        n.size,
			Annotations: map[string]string{ispec.AnnotationRefName: oci.Reference{Repository: n.key.repo, Tag: n.key.tag}.String()},
		})
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
