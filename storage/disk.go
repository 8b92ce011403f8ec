// Package storage is where bytes rest. It hides how content and what is known about it lie on the
// disk, and promises that nothing is visible before it is verified, that what was reported stored
// survives a power cut, and that private content is read only through repositories where an upstream
// has confirmed it.
//
// The data folder is an OCI image layout, so that other tools can read it, with more beside it:
//
//	oci-layout
//	index.json                       every tag, for other tools; never read here
//	blobs/<algorithm>/<hex>          content, manifests too
//	records/_public/<hex>            content that was once got anonymously: any repository reads it
//	records/<registry>/<repository>/
//	    _blobs/<hex>                 confirmed in this repository, needed for private content
//	    _manifests/<hex>             the same for a manifest, with its media type and last pull
//	    _tags/<tag>                  what a tag named when it was last confirmed
//	    _answers/<sha256 of key>     stored answers that are neither manifests nor blobs
//	tmp/                             what is being written; swept at start
//	    parked-<algorithm>-<hex>-<size>-<hash of repository>
//	                                 what has broken off, kept for an hour after its time
//	quarantine/                      what must not be served; for people to look at
//	unpublished/                     what has to be written to the shared store, a reference in each file
//	LOCK                             flock, and the id of the process that holds it
//	UNCLEAN                          when a process was last found not to have closed the folder
//	VERSION                          of this layout
//
// No component of a repository's name begins with "_", and the two algorithms' hex differ in length.
// A look-up goes straight to its path; nothing is scanned first, so that a start takes no time.
package storage

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// layoutVersion is what VERSION holds. It grows when an older Breakwater could misread the folder.
const layoutVersion = 1

// panicPause is how long nothing happens behind the requests after a panic there.
const panicPause = 10 * time.Second

// flushEvery is how often what is only kept in memory goes to the disk: ages that look a little
// older after a crash are all that can be lost.
const flushEvery = 5 * time.Second

// Config says where the store is. Only Dir must be set.
type Config struct {
	Dir      string       // the data folder; created if missing
	Capacity int64        // bytes of the disk that it may take, and a twentieth more for a while; 0 means no bound
	MinFree  int64        // bytes of the disk that it leaves free
	Scrub    int64        // bytes a second of the store that are verified for as long as it is open; 0 is none
	Logger   *slog.Logger // nil discards

	// Fault is for tests, nil otherwise: it is called ahead of each call of the file system (open, create,
	// read, write, sync …) with the path that it concerns, and makes it fail by returning an error. A write
	// that fails with io.ErrShortWrite lets half through.
	Fault func(call, name string) error
}

// Disk is the store in one data folder. All of its methods may be called at the same time.
type Disk struct {
	log      *slog.Logger
	capacity int64
	minFree  int64
	lockFile *os.File
	session  string        // begins the names of this process's temporary files
	sequence atomic.Uint64 // ends them

	*volume
	opened      []io.Closer // root and all below it that is open
	root        folder
	tmp         folder
	records     folder
	unpublished folder
	blobs       map[digest.Algorithm]folder

	index    *index
	policy   atomic.Pointer[Policy]
	evicting sync.Mutex    // one at a time; taken before all others
	evicted  atomic.Int64  // images
	pressed  chan struct{} // wakes the eviction

	health  health
	reading chan struct{} // who waits for the disk to open or read something small
	lost    sync.Map      // digests that could not be moved to quarantine, and are absent

	manifests *manifestCache
	tags      *tagCache
	exporter  exporter
	checks    checks
	writers   stripes
	folders   sync.Mutex // held while folders are made, until they are durable

	parking sync.Mutex             // held while parked files get or lose their names; guards parked and space
	parked  map[string]*parkedHash // by name in tmp/; those not hashed yet are missing
	space   map[string]int64       // reserved for a parked file, by its name

	stop context.CancelFunc
	work sync.WaitGroup // all that Open has started
}

// Open takes the data folder for this process and creates what is missing. It does not look at the
// content, so it returns at once however much there is. A folder that another process holds, that
// anybody may write to, or that a newer Breakwater has written, is refused.
func Open(cfg Config) (*Disk, error) {
	d := &Disk{
		log:      cfg.Logger,
		capacity: cfg.Capacity,
		minFree:  cfg.MinFree,
		index:    newIndex(),
		pressed:  make(chan struct{}, 1),
		session:  rand.Text()[:8],
		volume:   new(volume),
		writers:  stripes{seed: maphash.MakeSeed()},
		parked:   map[string]*parkedHash{},
		reading:  make(chan struct{}, maxReading),
		space:    map[string]int64{},
		checks: checks{
			first: map[digest.Digest]*check{}, right: map[digest.Digest]fs.FileInfo{},
			due: map[digest.Digest]bool{}, damaged: map[digest.Digest]bool{}, wake: make(chan struct{}, 1),
		},
	}
	if cfg.Fault != nil {
		d.fault.Store(&cfg.Fault)
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.capacity <= 0 {
		d.capacity = math.MaxInt64
	}
	if err := d.open(cfg.Dir); err != nil {
		return nil, errors.Join(fmt.Errorf("data folder %s: %w", cfg.Dir, err), d.release())
	}
	ctx, stop := context.WithCancel(context.Background())
	d.stop = stop
	d.behind(ctx, func() {
		d.sweep(ctx)
		d.rehash(ctx)
	})
	d.behind(ctx, func() {
		d.build(ctx)
		d.evictLoop(ctx)
	})
	d.behind(ctx, func() { d.flushLoop(ctx) })
	d.behind(ctx, func() { d.recheckLoop(ctx) })
	if cfg.Scrub > 0 {
		d.behind(ctx, func() { d.scrubLoop(ctx, cfg.Scrub) })
	}
	return d, nil
}

// Policy is what the configuration says of what is stored. Its functions may be nil, and are called without
// locks.
type Policy struct {
	Kept func() []oci.Reference     // tags and digests of images that are never evicted
	Out  func(registry string) bool // it could not give anything back now: its images are evicted last
	// Public reports whether what was got in a repository with that credential, "" for none, may be read
	// through every other one; nil: if it took none. It is asked at each reading.
	Public func(repo oci.Repository, credential string) bool
}

// Use makes the policy the one in force: also for what is stored already.
func (d *Disk) Use(p Policy) {
	d.policy.Store(&p)
	d.manifests.clear()
}

// behind runs what goes on behind the requests. A panic there must not end them: it is logged, and begun
// again after a while.
func (d *Disk) behind(ctx context.Context, do func()) {
	attempt := func() (done bool) {
		defer func() {
			if recovered := recover(); recovered != nil {
				d.log.Error("panic behind the requests", "err", recovered, "stack", string(debug.Stack()))
			}
		}()
		do()
		return true
	}
	d.work.Go(func() {
		for !attempt() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(panicPause):
			}
		}
	})
}

// open does all of Open that can fail.
func (d *Disk) open(dir string) (err error) {
	if d.root, err = d.openRoot(dir); err != nil {
		return err
	}
	d.opened = append(d.opened, d.root.root)
	if err := checkFolder(d.root, "."); err != nil {
		return err
	}
	if err := d.lock(); err != nil {
		return err
	}
	if err := d.checkVersion(); err != nil {
		return err
	}
	if d.manifests, err = newManifestCache(); err != nil {
		return err
	}
	if d.tags, err = newTagCache(); err != nil {
		return err
	}
	folders := map[string]folder{}
	for _, name := range []string{"tmp", "quarantine", "unpublished", "records", "records/_public", "blobs", "blobs/sha256", "blobs/sha512"} {
		if folders[name], err = d.openFolder(name); err != nil {
			return err
		}
	}
	d.tmp, d.records, d.unpublished = folders["tmp"], folders["records"], folders["unpublished"]
	d.blobs = map[digest.Algorithm]folder{digest.SHA256: folders["blobs/sha256"], digest.SHA512: folders["blobs/sha512"]}
	return errors.Join(d.createFiles(), d.noteUnclean())
}

func (d *Disk) openFolder(name string) (folder, error) {
	if err := d.root.mkdir(name); err != nil && !errors.Is(err, fs.ErrExist) {
		return folder{}, err
	}
	if err := checkFolder(d.root, name); err != nil {
		return folder{}, err
	}
	f, err := d.root.sub(name)
	if err == nil {
		d.opened = append(d.opened, f.root)
	}
	return f, err
}

// createFiles writes the files that make the folder an OCI layout of this version, where missing.
func (d *Disk) createFiles() error {
	for name, text := range map[string]string{
		"VERSION":             strconv.Itoa(layoutVersion) + "\n",
		ispec.ImageLayoutFile: `{"imageLayoutVersion":"` + ispec.ImageLayoutVersion + `"}`,
		ispec.ImageIndexFile:  `{"schemaVersion":2,"manifests":[]}`,
	} {
		_, err := d.root.lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			err = d.put(name, []byte(text))
		}
		if err != nil {
			return err
		}
	}
	// The folders made above have the data folder as parent, or one that was just made itself.
	return errors.Join(d.syncFolder("blobs"), d.syncFolder("records"), d.syncFolder("."))
}

// lock takes LOCK for as long as the process lives, or says who has it. The holder's id in the file
// goes when it stops cleanly; found here, it tells that the last one did not.
func (d *Disk) lock() error {
	file, err := d.root.openFile(callCreate, "LOCK", os.O_RDWR|os.O_CREATE)
	if err != nil {
		return err
	}
	d.lockFile = file
	if _, err := checkFile(d.root, "LOCK", file); err != nil { // before we write to what it may be a link to
		return err
	}
	var text [32]byte
	n, err := file.ReadAt(text[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	holder := strings.TrimSpace(string(text[:n]))
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("in use by process %s: two cannot share one data folder", cmp.Or(holder, "of unknown id"))
		}
		return os.NewSyscallError("flock", err)
	}
	if holder != "" {
		d.exporter.changed.Store(true)
		d.checks.unclean = time.Now()
	}
	err = d.truncate(file, 0)
	if err == nil {
		_, err = d.write(file, []byte(strconv.Itoa(os.Getpid())+"\n"))
	}
	if err != nil { // a full disk is no reason not to serve what is on it
		d.log.Warn("cannot note this process in LOCK", "err", err)
	}
	return nil
}

func (d *Disk) checkVersion() error {
	file, err := d.root.open("VERSION")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a new folder, or somebody's OCI layout
	}
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := checkFile(d.root, "VERSION", file); err != nil {
		return err
	}
	raw := make([]byte, 40)
	n, err := d.read(file, raw)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	raw = raw[:n]
	version, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || version < 1 {
		return fmt.Errorf("VERSION holds %q, which no Breakwater has written", raw)
	}
	if version > layoutVersion {
		return fmt.Errorf("is of version %d, written by a newer Breakwater; this one knows up to %d", version, layoutVersion)
	}
	return nil
}

// sweep removes what an earlier process left half-written, except what it has parked.
func (d *Disk) sweep(ctx context.Context) {
	err := d.tmp.each(".", func(e fs.DirEntry) error {
		if strings.HasPrefix(e.Name(), d.session) || strings.HasPrefix(e.Name(), parkedPrefix) {
			return ctx.Err()
		}
		if err := d.tmp.remove(e.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Warn("cannot remove a temporary file", "file", e.Name(), "err", err)
		}
		return ctx.Err()
	})
	if err != nil && ctx.Err() == nil {
		d.log.Warn("cannot sweep temporary files", "err", err)
	}
	d.dropExpired()
}

// flushLoop writes behind what need not be durable at once.
func (d *Disk) flushLoop(ctx context.Context) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	tags, pulls := time.Now(), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			if now.Sub(tags) >= flushEvery {
				d.flushTags()
				tags = now
			}
			if now.Sub(pulls) >= time.Minute {
				d.flushPulls()
				d.dropExpired()
				pulls = now
			}
			d.exportIfDue(now)
		}
	}
}

// Close writes what is only in memory, waits for all that Open has started, and frees the folder.
// What is open for reading stays readable.
func (d *Disk) Close() error {
	d.stop()
	d.checks.mu.Lock()
	d.checks.closed = true
	d.checks.mu.Unlock()
	d.work.Wait()
	d.flushTags()
	d.flushPulls()
	var err error
	if d.exporter.changed.Load() && d.index.Built() { // else the next start does
		err = d.export()
	}
	if d.checks.noted {
		err = errors.Join(err, d.truncate(d.lockFile, 0))
	}
	return errors.Join(err, d.release())
}

// release closes whatever open has opened, LOCK last: the kernel frees the lock with its file.
func (d *Disk) release() error {
	var err error
	for _, c := range d.opened {
		err = errors.Join(err, c.Close())
	}
	if d.lockFile != nil {
		err = errors.Join(err, d.lockFile.Close())
	}
	return err
}
