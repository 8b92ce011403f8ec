// Package clients hides how the programs that pull images are pointed at the mirror, each in files of
// its own, and how those files are restored. It promises that what was there before is never lost: a
// file that is not ours is changed only if that is asked for, is kept beside ours, and comes back as it
// was. It may be killed at any moment; the next call ends what was begun.
package clients

// Act is what is done with one file.
type Act string

// The acts. What is Kept or Refused is left as it is, and the Note of its Change says why.
const (
	Unchanged Act = "unchanged" // is ours, and as it should be
	Write     Act = "write"     // there is none
	Update    Act = "update"    // is ours, and not as it should be
	Replace   Act = "replace"   // is not ours; it is kept, with .before-breakwater behind its name
	Remove    Act = "remove"    // is ours, and there was none before
	Restore   Act = "restore"   // is ours, and there was one before, which comes back
	Keep      Act = "keep"
	Refuse    Act = "refuse"
)

// Change is what is done, or would be, with one file.
type Change struct {
	Path    string `json:"path"`
	Act     Act    `json:"act"`
	Note    string `json:"note,omitempty"`    // what somebody should know about it
	Content string `json:"content,omitempty"` // of a hosts.toml that is written, without secrets
}

// Settled reports whether nothing is left to do: the file is as it should be, or somebody's who keeps it.
func (c Change) Settled() bool { return c.Act == Unchanged || c.Act == Keep }

// Existing says what happens where a file is that is not ours.
type Existing string

// What Existing may be.
const (
	ExistingRefuse  Existing = "refuse"  // nothing is written at all
	ExistingReplace Existing = "replace" // it is kept beside ours
	ExistingKeep    Existing = "keep"    // it stays, and the others are written
)
