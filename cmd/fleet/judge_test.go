package main

import (
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// TestWorst: what the fleet asked within any minute is found, wherever that begins.
func TestWorst(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(seconds ...int) (times []time.Time) {
		for _, s := range seconds {
			times = append(times, begin.Add(time.Duration(s)*time.Second))
		}
		return times
	}
	for _, c := range []struct {
		times map[string][]time.Time
		want  int
	}{
		{nil, 0},
		{map[string][]time.Time{"a": at(0, 60, 120), "b": at(5)}, 1},
		{map[string][]time.Time{"a": at(0, 60, 120), "b": at(170, 50, 30, 90)}, 2}, // out of order, across the minutes of a clock
		{map[string][]time.Time{"a": at(0, 57)}, 2},
		{map[string][]time.Time{"a": at(0, 58)}, 1}, // what goes on behind may be late
	} {
		if got, _ := worst(c.times); got != c.want {
			t.Errorf("%v: %d, want %d", c.times, got, c.want)
		}
	}
}

// TestCompare: an answer agrees with what the record has named lately, and is ahead if it was never published.
func TestCompare(t *testing.T) {
	now := time.Now()
	ago := func(seconds int) time.Time { return now.Add(-time.Duration(seconds) * time.Second) }
	one, two, three, none := digest.FromString("1"), digest.FromString("2"), digest.FromString("3"), digest.FromString("none")
	l := &library{
		pushed:    map[string][]naming{"a": {{one, ago(100)}, {two, ago(50)}, {none, ago(45)}, {three, ago(40)}}, "b": {{one, ago(9)}}},
		published: map[string][]naming{"a": {{one, ago(90)}, {two, ago(10)}}},
	}
	for _, c := range []struct {
		tag  string
		dgst digest.Digest
		then time.Time
		want word
	}{
		{"a", two, ago(5), agrees},
		{"a", one, ago(15), agrees}, // it was the record until then
		{"a", one, ago(5), disagrees},
		{"a", three, ago(5), ahead},
		{"b", one, ago(5), ahead}, // nothing is published
	} {
		if got := l.compare(c.tag, c.dgst, c.then); got != c.want {
			t.Errorf("%s %s: %d, want %d", c.tag, c.dgst, got, c.want)
		}
	}
	l.published["a"] = append(l.published["a"], naming{three, ago(1)})
	if got := l.compare("a", none, ago(5)); got != disagrees {
		t.Errorf("never published, and older than what is: %d", got)
	}
}
