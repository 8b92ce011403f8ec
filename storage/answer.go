package storage

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
	"time"

	"breakwater/pkg/oci"
)

const (
	// maxAnswer bounds a stored answer's body; the record is a third longer.
	maxAnswer = 4 << 20
	// maxAnswers is how many of one kind are kept of one repository: clients vary a list's query at will,
	// of referrers there is one answer a manifest.
	maxAnswers   = 64
	maxReferrers = 4096
)

// Answer is an upstream's answer that is neither a manifest nor a blob: a list of tags or referrers.
type Answer struct {
	Body        []byte    `json:"body"`
	MediaType   string    `json:"media_type"`
	Link        string    `json:"link,omitempty"` // the header that names the next page
	ValidatedAt time.Time `json:"validated_at"`
	Upstream    string    `json:"upstream"`
	Credential  string    `json:"credential,omitempty"` // as of a Confirmation; "" if it is for everybody
}

func (a *Answer) check() error {
	if len(a.Body) > maxAnswer {
		return fmt.Errorf("has a body of %d bytes", len(a.Body))
	}
	return nil
}

// answersFolder is where the answers of a kind are, the first part of the key: tags or referrers.
func answersFolder(repo oci.Repository, key string) (folder string, most int) {
	kind, _, _ := strings.Cut(strings.TrimPrefix(key, "/"), "/")
	if kind == "referrers" {
		return path.Join(repo.Registry, repo.Name, "_referrers"), maxReferrers
	}
	return path.Join(repo.Registry, repo.Name, "_answers"), maxAnswers
}

func answerRecord(repo oci.Repository, key string) string {
	sum := sha256.Sum256([]byte(key))
	folder, _ := answersFolder(repo, key)
	return path.Join(folder, hex.EncodeToString(sum[:]))
}

// Answer returns the answer stored under key, or fs.ErrNotExist.
func (d *Disk) Answer(repo oci.Repository, key string) (Answer, error) {
	var a Answer
	if err := d.readRecord(answerRecord(repo, key), &a); err != nil {
		return Answer{}, fmt.Errorf("answer %s %q: %w", repo, key, err)
	}
	return a, nil
}

// PutAnswer stores an answer under key, and forgets the repository's oldest above 64, or 4096 of referrers. It refuses a
// body over 4 MiB with ErrTooLarge.
func (d *Disk) PutAnswer(repo oci.Repository, key string, a Answer) error {
	if err := d.putAnswer(repo, key, a); err != nil {
		return fmt.Errorf("store answer %s %q: %w", repo, key, err)
	}
	return nil
}

func (d *Disk) putAnswer(repo oci.Repository, key string, a Answer) error {
	if err := a.check(); err != nil {
		return fmt.Errorf("%w: %w", ErrTooLarge, err)
	}
	folder, most := answersFolder(repo, key)
	mu := d.writers.of(folder) // one at a time, so that they are counted right
	mu.Lock()
	defer mu.Unlock()
	a.ValidatedAt = a.ValidatedAt.UTC().Round(0)
	if err := d.writeRecord(answerRecord(repo, key), &a); err != nil {
		return err
	}
	for {
		oldest, count := "", 0
		var at time.Time
		err := d.records.each(folder, func(e fs.DirEntry) error {
			info, err := e.Info()
			if err != nil {
				return err
			}
			if count++; oldest == "" || info.ModTime().Before(at) {
				oldest, at = e.Name(), info.ModTime()
			}
			return nil
		})
		if err != nil || count <= most {
			return err
		}
		if err := d.records.remove(path.Join(folder, oldest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}
