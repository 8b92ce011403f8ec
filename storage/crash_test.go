package storage

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"breakwater/pkg/oci"

	"github.com/opencontainers/go-digest"
)

// crashDir tells the test binary, started by TestF45, to write into that data folder until killed.
const crashDir = "BREAKWATER_TEST_CRASH_DIR"

// writeUntilKilled prints a line, "blob DIGEST" or "tag NAME DIGEST", for whatever it was told is
// stored, and "parked SEED BYTES" for what was parked of seeded content.
func writeUntilKilled(dir string) {
	cfg := Config{Dir: dir, Capacity: 1 << 30}
	if os.Getenv(noSync) != "" {
		cfg.Fault = func(call, _ string) error {
			if call == string(callSync) {
				return errNoSync
			}
			return nil
		}
	}
	d, err := Open(cfg)
	if err != nil {
		panic(err)
	}
	var out sync.Mutex
	say := func(words ...any) {
		out.Lock()
		defer out.Unlock()
		fmt.Println(words...)
	}
	var workers sync.WaitGroup
	for n := range 8 {
		workers.Go(func() {
			for {
				raw, dgst := content(1 + rand.IntN(200<<10)) // on both sides of what is withheld
				in, err := d.Ingest(app, dgst, int64(len(raw)))
				if err == nil {
					_, err = in.Write(raw)
				}
				if err == nil {
					err = commit(in, anonymous)
				}
				if err != nil {
					panic(err)
				}
				say("blob", dgst)
				m, err := oci.ParseManifest("", fmt.Appendf(nil, `{"layers":[{"mediaType":"a/b","digest":%q,"size":%d}]}`, dgst, len(raw)), digest.SHA256)
				if err == nil {
					err = d.PutManifest(app, m, anonymous)
				}
				tag := fmt.Sprint("t", n)
				if err == nil {
					err = d.PutTag(app, tag, Tag{Current: Validated{m.Digest, time.Now(), "u"}})
				}
				if err != nil {
					panic(err)
				}
				say("tag", tag, m.Digest)
			}
		})
	}
	workers.Go(func() {
		for range 3 {
			seed, n := rand.Uint64(), worthParking+rand.IntN(worthParking)
			raw := seeded(seed)
			in, err := d.Ingest(app, digest.FromBytes(raw), int64(len(raw)))
			if err == nil {
				_, err = in.Write(raw[:n])
			}
			if err != nil {
				panic(err)
			}
			in.Park(io.ErrUnexpectedEOF)
			say("parked", seed, n)
		}
	})
	workers.Wait()
}

// seeded is content that another process can make again.
func seeded(seed uint64) []byte {
	raw := make([]byte, 2*worthParking)
	for n := 0; n < len(raw); n += 8 {
		seed = seed*6364136223846793005 + 1442695040888963407
		binary.LittleEndian.PutUint64(raw[n:], seed)
	}
	return raw
}

// acknowledged is what a writer has reported.
type acknowledged struct {
	blobs  map[digest.Digest]bool
	tags   map[string][]digest.Digest // what each named, in order
	parked map[string]string
}

func newAcknowledged() *acknowledged {
	return &acknowledged{map[digest.Digest]bool{}, map[string][]digest.Digest{}, map[string]string{}}
}

func (a *acknowledged) note(words []string) {
	switch words[0] {
	case "blob":
		a.blobs[digest.Digest(words[1])] = true
	case "tag":
		a.tags[words[1]] = append(a.tags[words[1]], digest.Digest(words[2]))
	case "parked":
		a.parked[words[1]] = words[2]
	}
}

// check fails the test unless all of it is in the store, and nothing in there is wrong.
func (a *acknowledged) check(t *testing.T, d *Disk) {
	t.Helper()
	for dgst := range a.blobs {
		b, err := d.Blob(app, dgst)
		if err != nil {
			t.Fatalf("reported stored: %v", err)
		}
		_ = b.Close()
	}
	for tag, said := range a.tags {
		record, err := d.Tag(app, tag)
		if err != nil {
			t.Fatalf("reported stored: %v", err)
		}
		// One change may be on the disk that was not reported yet; none that was may be undone.
		if now, last := record.Current.Digest, said[len(said)-1]; now != last {
			for _, earlier := range said {
				if now == earlier {
					t.Fatalf("tag %s has turned back", tag)
				}
			}
		}
		if _, err := d.Manifest(app, record.Current.Digest); err != nil {
			t.Fatalf("tag %s: %v", tag, err)
		}
	}
	names, err := fs.Glob(d.root.root.FS(), "blobs/sha256/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		raw, err := d.root.root.ReadFile(name)
		if err != nil || digest.FromBytes(raw).Encoded() != filepath.Base(name) {
			t.Fatalf("%s holds %s, %v", name, digest.FromBytes(raw), err)
		}
	}
}

func TestF45KilledInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	said, resumed := newAcknowledged(), 0
	for range 20 {
		clear(said.parked)
		writeAndKill(t, dir, 20+rand.IntN(60), said.note)
		d := open(t, dir)
		for word, written := range said.parked {
			seed, err := strconv.ParseUint(word, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			from, err := strconv.Atoi(written)
			if err != nil {
				t.Fatal(err)
			}
			wantResumed(t, d, seeded(seed), from)
			resumed++
		}
		said.check(t, d)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(said.blobs) < 100 || resumed < 10 {
		t.Errorf("only %d blobs were stored, %d resumed", len(said.blobs), resumed)
	}
}

// writeAndKill runs a writer, hands on what it reports, and kills it after that many lines.
func writeAndKill(t *testing.T, dir string, lines int, report func([]string)) {
	t.Helper()
	writer := exec.CommandContext(context.Background(), os.Args[0])
	writer.Env = append(os.Environ(), crashDir+"="+dir)
	var stderr bytes.Buffer
	writer.Stderr = &stderr
	out, err := writer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	scanner := bufio.NewScanner(out)
	for n := 0; scanner.Scan(); n++ {
		report(strings.Fields(scanner.Text()))
		if n == lines {
			_ = writer.Process.Kill() // what is still in the pipe was reported too
		}
	}
	if err := writer.Wait(); err == nil || stderr.Len() > 0 {
		t.Fatalf("the writer ended by itself: %v\n%s", err, stderr.String())
	}
}

// What an earlier process may have left, and what must come of it.
func TestStatesAtOpen(t *testing.T) {
	m, layer := image(t)
	for name, test := range map[string]struct {
		spoil   func(*os.Root) error
		refused string // Open's error
		blob    bool   // the blob is still served
		tag     bool   // the tag still names the manifest
	}{
		"clean":              {spoil: func(*os.Root) error { return nil }, blob: true, tag: true},
		"temporary files":    {spoil: spoilWith("tmp/old-1", "half"), blob: true, tag: true},
		"killed":             {spoil: spoilWith("LOCK", "1\n"), blob: true, tag: true},
		"no VERSION":         {spoil: spoilWithout("VERSION"), blob: true, tag: true},
		"newer VERSION":      {spoil: spoilWith("VERSION", "2\n"), refused: "newer Breakwater"},
		"strange VERSION":    {spoil: spoilWith("VERSION", "<html>"), refused: "VERSION"},
		"no index.json":      {spoil: spoilWithout("index.json"), blob: true, tag: true},
		"no oci-layout":      {spoil: spoilWithout("oci-layout"), blob: true, tag: true},
		"empty tag record":   {spoil: spoilWith("records/quay.io/org/app/_tags/latest", ""), blob: true},
		"foreign tag record": {spoil: spoilWith("records/quay.io/org/app/_tags/latest", `{"current":{"digest":"md5:1"}}`), blob: true},
		"huge tag record":    {spoil: spoilWith("records/quay.io/org/app/_tags/latest", strings.Repeat(" ", maxRecord+1)), blob: true},
		"empty record":       {spoil: spoilWith("records/_public/"+digest.FromBytes(layer).Encoded(), ""), tag: true},
		"no record":          {spoil: spoilWithout("records/_public/" + digest.FromBytes(layer).Encoded()), tag: true},
		"no blob":            {spoil: spoilWithout("blobs/sha256/" + digest.FromBytes(layer).Encoded()), tag: true},
		"blob cut short":     {spoil: spoilWith("blobs/sha256/"+digest.FromBytes(layer).Encoded(), "half"), tag: true},
		"no manifest":        {spoil: spoilWithout("blobs/sha256/" + m.Digest.Encoded()), blob: true},
		"manifest rotten":    {spoil: spoilWith("blobs/sha256/"+m.Digest.Encoded(), strings.Replace(string(m.Raw), `"size":1000`, `"size":1001`, 1)), blob: true},
		"unknown file":       {spoil: spoilWith("blobs/sha256/README", "keep me"), blob: true, tag: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			d := open(t, dir)
			store(t, d, app, layer, anonymous)
			if err := errors.Join(d.PutManifest(app, m, anonymous), d.PutTag(app, "latest", Tag{Current: Validated{m.Digest, anonymous.At, "u"}}), d.Close()); err != nil {
				t.Fatal(err)
			}
			root := mustRoot(t, dir)
			if err := test.spoil(root); err != nil {
				t.Fatal(err)
			}
			d, err := Open(Config{Dir: dir})
			if test.refused != "" {
				if err == nil || !strings.Contains(err.Error(), test.refused) || !strings.Contains(err.Error(), dir) {
					t.Fatalf("%v, want %q", err, test.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			b, err := d.Blob(app, digest.FromBytes(layer))
			if test.blob != (err == nil) || !test.blob && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("blob: %v", err)
			}
			if err == nil {
				if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, layer) {
					t.Errorf("blob: %d bytes, %v", len(got), err)
				}
				_ = b.Close()
			}
			record, err := d.Tag(app, "latest")
			if err == nil {
				_, err = d.Manifest(app, record.Current.Digest)
			}
			if test.tag != (err == nil) || !test.tag && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("tag: %v", err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			for _, file := range []string{"VERSION", "oci-layout", "index.json"} {
				if _, err := root.Stat(file); err != nil {
					t.Error(err)
				}
			}
			if _, err := root.Stat("tmp/old-1"); err == nil {
				t.Error("temporary files were not swept")
			}
			if raw, err := root.ReadFile("blobs/sha256/README"); name == "unknown file" && string(raw) != "keep me" {
				t.Error(err)
			}
		})
	}
}

func spoilWith(name, text string) func(*os.Root) error {
	return func(root *os.Root) error { return root.WriteFile(name, []byte(text), 0o600) }
}

func spoilWithout(name string) func(*os.Root) error {
	return func(root *os.Root) error { return root.Remove(name) }
}
