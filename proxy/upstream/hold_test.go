package upstream

import (
	"net/http"
	"testing"
	"time"
)

func TestF12RetryAfter(t *testing.T) {
	now := time.Date(2017, time.July, 26, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		value  string
		random float64
		want   time.Duration
	}{
		{"120", 0.5, 2 * time.Minute},
		{" 120 ", 0.5, 2 * time.Minute},
		{"0", 0.5, time.Second},
		{"3601", 0.5, time.Hour},
		{"999999999", 0.5, time.Hour},
		{"99999999999999999999999999", 0.5, time.Hour},
		{"", 0, 24 * time.Second},
		{"", 0.5, 30 * time.Second},
		{"", 1, 36 * time.Second},
		{"-5", 0.5, 30 * time.Second},
		{"1.5", 0.5, 30 * time.Second},
		{"1h", 0.5, 30 * time.Second},
		{"soon", 0.5, 30 * time.Second},
		{"Wed, 26 Jul 2017 12:02:00 GMT", 0.5, 2 * time.Minute},
		{"Wednesday, 26-Jul-17 12:02:00 GMT", 0.5, 2 * time.Minute},
		{"Wed, 26 Jul 2017 11:00:00 GMT", 0.5, time.Second},
		{"Thu, 01 Jan 1970 00:00:00 GMT", 0.5, time.Second},
		{"Fri, 01 Jan 2999 00:00:00 GMT", 0.5, time.Hour},
	}
	for _, tt := range tests {
		h := http.Header{}
		if tt.value != "" {
			h.Set("Retry-After", tt.value)
		}
		if got := retryAfter(h, now, func() float64 { return tt.random }); got != tt.want {
			t.Errorf("Retry-After %q is %v, want %v", tt.value, got, tt.want)
		}
	}
}

func TestF11HoldOff(t *testing.T) {
	var h hold
	now := time.Now()
	if got := h.left(now); got != 0 {
		t.Errorf("nothing was asked, and %v are left", got)
	}
	ask := func(seconds string) time.Duration { return h.extend(http.Header{"Retry-After": {seconds}}, now) }
	if got := ask("120"); got != 2*time.Minute {
		t.Errorf("held off for %v, want 2m", got)
	}
	if got := ask("10"); got != 2*time.Minute {
		t.Errorf("a later answer cut it to %v", got)
	}
	if got := h.left(now.Add(30 * time.Second)); got != 90*time.Second {
		t.Errorf("%v left after 30 s, want 90 s", got)
	}
	if got := h.left(now.Add(2 * time.Minute)); got != 0 {
		t.Errorf("%v left at its end, want none", got)
	}
}
