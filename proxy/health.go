package proxy

import (
	"fmt"
	"net/http"
	"time"

	"breakwater/storage/s3"

	"github.com/prometheus/client_golang/prometheus"
)

// What is told of the shared store.
var (
	sharedRequests = prometheus.NewDesc("breakwater_shared_requests_total", "Requests to the shared store by what they do.", []string{"kind"}, nil)
	sharedFailures = prometheus.NewDesc("breakwater_shared_failures_total", "Requests to the shared store that have failed.", nil, nil)
	sharedOut      = prometheus.NewDesc("breakwater_shared_out", "1 while the shared store is not asked, since it does not answer: to read, or to write.", []string{"access"}, nil)
	sharedWaiting  = prometheus.NewDesc("breakwater_shared_unpublished", "Tags and manifests that wait to be written to the shared store.", nil, nil)
	sharedDropped  = prometheus.NewDesc("breakwater_shared_dropped_total", "Tags and manifests that waited too long in too long a queue, and are written at their next pull.", nil, nil)
	sharedIgnored  = prometheus.NewDesc("breakwater_shared_ignored_records_total", "Records in the shared store that were not believed: not signed by the fleet, malformed, or older than what was seen.", nil, nil)
	sharedOffset   = prometheus.NewDesc("breakwater_shared_clock_offset_seconds", "How far the shared store's clock is ahead of this host's. Over 300 either way nothing is published.", nil, nil)
)

// Describe is for prometheus.Collector.
func (f *fleet) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{sharedRequests, sharedFailures, sharedOut, sharedWaiting, sharedDropped, sharedIgnored, sharedOffset} {
		ch <- desc
	}
}

// Collect is for prometheus.Collector.
func (f *fleet) Collect(ch chan<- prometheus.Metric) {
	h := f.bucket.Health()
	for kind, n := range h.Requests {
		ch <- prometheus.MustNewConstMetric(sharedRequests, prometheus.CounterValue, float64(n), kind)
	}
	for access, gate := range map[string]s3.Gate{"read": h.Reads, "write": h.Writes} {
		out := 0.0
		if gate.Open {
			out = 1
		}
		ch <- prometheus.MustNewConstMetric(sharedOut, prometheus.GaugeValue, out, access)
	}
	for desc, n := range map[*prometheus.Desc]float64{sharedFailures: float64(h.Failures), sharedIgnored: float64(h.Ignored), sharedDropped: float64(f.publish.dropped.Load())} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, n)
	}
	ch <- prometheus.MustNewConstMetric(sharedWaiting, prometheus.GaugeValue, float64(f.publish.count()))
	ch <- prometheus.MustNewConstMetric(sharedOffset, prometheus.GaugeValue, h.Offset.Seconds())
}

// serveReady says what is out: none of it is a reason not to be ready.
func (m *Mirror) serveReady(w http.ResponseWriter, _ *http.Request) {
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	say("ok")
	if trouble := m.store.Trouble(); trouble != nil {
		say("store: cannot write since %s: %s", inUTC(trouble.Since), trouble.Reason())
	}
	if m.fleet != nil {
		h := m.fleet.bucket.Health()
		if h.Reads.Open {
			say("%s: out since %s: %s", sharedName, inUTC(h.Reads.Since), h.Reads.Reason)
		}
		if h.Writes.Open {
			say("%s: not written to since %s: %s", sharedName, inUTC(h.Writes.Since), h.Writes.Reason)
		}
		if h.ClockWrong {
			say("%s: nothing is published, since this host's clock is %s", sharedName, misset(h))
		}
	}
	for _, c := range m.pool.All() {
		for i, h := range c.Health() {
			if left := time.Until(h.HeldUntil); i == 0 && left > 0 {
				say("%s: upstream %s is not asked for another %s: it answered 429", c.Registry(), c.Upstream(), left.Round(time.Second))
			}
			if h.State != "closed" {
				say("%s: upstream %s %s %s since %s: %s", c.Registry(), c.Upstream(), h.Class, h.State, inUTC(h.Since), h.Reason)
			}
		}
	}
}

// misset is how wrong this host's clock is by the bucket's; "" if it is right, or nearly so.
func misset(h s3.Health) string {
	switch off := h.Offset.Abs().Round(time.Second).String(); {
	case !h.ClockWrong:
		return ""
	case h.Offset > 0:
		return off + " slow"
	default:
		return off + " fast"
	}
}

func inUTC(t time.Time) string { return t.UTC().Format(time.RFC3339) }
