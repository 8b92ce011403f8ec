package storage

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"time"

	"breakwater/pkg/oci"
)

const (
	// maxAnswer bounds a stored answer's body; the record is a third longer.
	maxAnswer = 4 << 20
	// maxAnswers is how many are kept of one repository.
	maxAnswers = 64
)

// Answer is an upstream's answer that is neither a manifest nor a blob: a list of tags or referrers.
type Answer struct {
	Body        []byte    `json:"body"`
	MediaType   string    `json:"media_type"`
	Link        string    `json:"link,omitempty"` // the header that names the next page
	ValidatedAt time.Time `json:"validated_at"`
	Upstream    string    `json:"upstream"`
}

func (a *Answer) check() error {
	if len(a.Body) > maxAnswer {
		return fmt.Errorf("has a body of %d bytes", len(a.Body))
	}
	return nil
}

func answersFolder(repo oci.Repository) string {
	return path.Join(repo.Registry, repo.Name, "_answers")
}

func answerRecord(repo oci.Repository, key string) string {
	sum := sha256.Sum256([]byte(key))
	return path.Join(answersFolder(repo), hex.EncodeToString(sum[:]))
}

// Answer returns the answer stored under key, or fs.ErrNotExist.
func (d *Disk) Answer(repo oci.Repository, key string) (Answer, error) {
	var a Answer
	if err := d.readRecord(answerRecord(repo, key), &a); err != nil {
		return Answer{}, fmt.Errorf("answer %s %q: %w", repo, key, err)
	}
	return a, nil
}

// PutAnswer stores an answer under key, and forgets the repository's oldest above 64. It refuses a
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
	mu := d.writers.of(answersFolder(repo)) // one at a time, so that they are counted right
	mu.Lock()
	defer mu.Unlock()
	a.ValidatedAt = a.ValidatedAt.UTC().Round(0)
	if err := d.writeRecord(answerRecord(repo, key), &a); err != nil {
		return err
	}
	for {
		oldest, count := "", 0
		var at time.Time
		err := eachEntry(d.records.Root, answersFolder(repo), func(e fs.DirEntry) error {
			info, err := e.Info()
			if err != nil {
				return err
			}
			if count++; oldest == "" || info.ModTime().Before(at) {
				oldest, at = e.Name(), info.ModTime()
			}
			return nil
		})
		if err != nil || count <= maxAnswers {
			return err
		}
		if err := d.records.Remove(path.Join(answersFolder(repo), oldest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
}
