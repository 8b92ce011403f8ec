package storage

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"

	"breakwater/pkg/oci"
)

// maxReference bounds what is read of a reference: an image's name, a tag or a digest.
const maxReference = 1 << 10

// NoteUnpublished notes that a tag or a manifest has to be written to the shared store: a process that is
// killed leaves that to the next one. A power cut may undo it; then the next pull asks for it again. It takes as
// long as the disk does: nothing that a client waits for may call it.
func (d *Disk) NoteUnpublished(ref oci.Reference) error {
	file, err := d.unpublished.openFile(callCreate, journalName(ref), os.O_WRONLY|os.O_CREATE|os.O_TRUNC)
	if err == nil {
		_, err = d.write(file, []byte(ref.String()))
		err = errors.Join(err, file.Close())
	}
	return d.wrote("record", 0, err)
}

// ForgetUnpublished takes back what NoteUnpublished has noted.
func (d *Disk) ForgetUnpublished(ref oci.Reference) error {
	err := d.unpublished.remove(journalName(ref))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return d.wrote("record", 0, err)
}

// Unpublished calls do for all that NoteUnpublished has noted and that was not taken back. Neither may be called
// before it returns: what is being noted looks like what was written by half.
func (d *Disk) Unpublished(do func(oci.Reference)) error {
	return d.unpublished.each(".", func(e fs.DirEntry) error {
		file, info, err := d.openFile(d.unpublished, e.Name())
		if err != nil {
			return ignoreAbsent(err)
		}
		defer file.Close()
		raw := make([]byte, min(info.Size(), maxReference))
		if err := d.readFull(file, raw); err != nil {
			return err
		}
		ref, err := oci.ParseImage(string(raw))
		if err != nil || journalName(ref) != e.Name() { // written by half
			return ignoreAbsent(d.unpublished.remove(e.Name()))
		}
		do(ref)
		return nil
	})
}

// journalName is that of a reference's file, which its own name would be too long for.
func journalName(ref oci.Reference) string {
	sum := sha256.Sum256([]byte(ref.String()))
	return hex.EncodeToString(sum[:])
}
