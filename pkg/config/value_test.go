package config

import (
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestDurationText(t *testing.T) {
	for text, want := range map[string]Duration{
		"0s": Set(0), "1.5s": Set(1500 * time.Millisecond), "500ms": Set(500 * time.Millisecond), "72h": Set(72 * time.Hour), "7d": Set(7 * day),
		"1h30m": Set(90 * time.Minute), "10m": Set(10 * time.Minute), "20s": Set(20 * time.Second), "1h0m5s": Set(time.Hour + 5*time.Second),
		"unlimited": Set(Unlimited), "-5s": Set(-5 * time.Second), "1ns": Set(1),
	} {
		var d Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d != want || d.String() != text {
			t.Errorf("%s: %v, %v", text, d, err)
		}
	}
	for text, want := range map[string]Duration{"0": Set(0), "1d12h": Set(36 * time.Hour), "1.5d": Set(36 * time.Hour), "3d": Set(72 * time.Hour), "90m": Set(90 * time.Minute)} {
		var d, again Duration
		if err := d.UnmarshalText([]byte(text)); err != nil || d != want {
			t.Errorf("%s: %v, %v", text, d, err)
		}
		if err := again.UnmarshalText([]byte(d.String())); err != nil || again != d {
			t.Errorf("%s is shown as %s, which is %v", text, d, again)
		}
	}
	for _, text := range []string{"", "5", "d", "1dd", "12h1d", "1d 2h", "NaNd", "infd", "1000000d", "106751d100h", "soon", "1 week", "Unlimited"} {
		if d := new(Duration); d.UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is %v", text, d)
		}
	}
	if (Duration{}).String() != "" || !(Duration{}).IsZero() || Set(0).IsZero() {
		t.Error("what is not set is not 0s")
	}
}

func TestSizeText(t *testing.T) {
	for text, want := range map[string]Size{
		"auto": {}, "80%": {Percent: 80}, "12.5%": {Percent: 12.5}, "50GiB": {Bytes: 50 << 30}, "1B": {Bytes: 1}, "1023KiB": {Bytes: 1023 << 10},
		"9223372036854775807B": {Bytes: math.MaxInt64}, "4EiB": {Bytes: 4 << 60},
	} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want || s.String() != text {
			t.Errorf("%s: %v, %v", text, s, err)
		}
	}
	for text, want := range map[string]Size{"200 GB": {Bytes: 200e9}, "1.5TiB": {Bytes: 3 << 39}, "2g": {Bytes: 2e9}, "1,000": {Bytes: 1000}, "5 %": {Percent: 5}} {
		var s, again Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%s: %v, %v", text, s, err)
		}
		if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
			t.Errorf("%s is shown as %s, which is %v", text, s, again)
		}
	}
	for _, text := range []string{"", "0", "0%", "101%", "-1%", "NaN%", "%", "-5GiB", "5 parsecs", "16EiB", "8EiB", "Auto", "٣GiB"} {
		if s := new(Size); s.UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is %v", text, s)
		}
	}
}

func TestRateText(t *testing.T) {
	for text, want := range map[string]Rate{"off": 0, "8MiB/s": 8 << 20, "1B/s": 1, "9223372036854775807B/s": math.MaxInt64} {
		var r Rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r != want || r.String() != text {
			t.Errorf("%s: %v, %v", text, r, err)
		}
	}
	for text, want := range map[string]Rate{"1 GB/s": 1e9, "1.5m/s": 15e5} {
		var r, again Rate
		if err := r.UnmarshalText([]byte(text)); err != nil || r != want {
			t.Errorf("%s: %v, %v", text, r, err)
		}
		if err := again.UnmarshalText([]byte(r.String())); err != nil || again != r {
			t.Errorf("%s is shown as %s, which is %v", text, r, again)
		}
	}
	for _, text := range []string{"", "0", "0B/s", "/s", "8MiB", "8MiB/m", "-1MiB/s", "Off", "auto", "16EiB/s"} {
		if r := new(Rate); r.UnmarshalText([]byte(text)) == nil {
			t.Errorf("%q is %v", text, r)
		}
	}
}

func TestSizeIn(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "not", "yet")
	if n, err := (Size{Bytes: 7}).In(missing); n != 7 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	whole, err := Size{Percent: 100}.In(missing)
	if err != nil || whole <= 0 {
		t.Fatalf("%d, %v", whole, err)
	}
	if half, err := (Size{Percent: 50}).In(dir); err != nil || half-whole/2 > 1 || whole/2-half > 1 {
		t.Errorf("half of %d is %d, %v", whole, half, err)
	}
	if auto, err := (Size{}).In(missing); err != nil || auto <= 0 || auto > 50<<30 {
		t.Errorf("auto is %d, %v", auto, err)
	}
	if err := os.WriteFile(missing[:len(dir)+4], nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := (Size{}).In(missing); err == nil {
		t.Errorf("below a file: %d", n)
	}
}
