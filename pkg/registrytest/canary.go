package registrytest

import (
	"encoding/base64"
	"io"
	"strings"
	"testing"
)

// Canary is a part of every secret that this package makes up, tokens and signatures, and should be of
// the passwords of tests: where it turns up among what people get to see, a secret has got out.
const Canary = "canary"

// canaries is how it looks as it is, and in base64 behind any number of other bytes.
var canaries = func() []string {
	all := []string{Canary}
	for before := range 3 {
		text := base64.RawStdEncoding.EncodeToString([]byte(strings.Repeat("x", before) + Canary))
		first := (before*8 + 5) / 6 // the characters before it depend on the other bytes too
		all = append(all, text[first:(before+len(Canary))*8/6])
	}
	return all
}()

// Leak is the place at which text tells a secret that has a Canary in it, in base64 too; "" if it does
// not.
func Leak(text string) string {
	for _, canary := range canaries {
		if i := strings.Index(text, canary); i >= 0 {
			return text[max(0, i-300):min(len(text), i+100)]
		}
	}
	return ""
}

// Watch returns a writer for a log, which fails the test when a secret is written to it.
func Watch(t testing.TB) io.Writer { return watcher{t} }

type watcher struct{ testing.TB }

func (w watcher) Write(p []byte) (int, error) {
	if leak := Leak(string(p)); leak != "" {
		w.Errorf("a secret is told: %s", leak)
	}
	return len(p), nil
}
