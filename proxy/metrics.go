package proxy

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics is what the mirror tells of itself.
type metrics struct {
	registry      *prometheus.Registry
	requests      *prometheus.CounterVec
	seconds       *prometheus.HistogramVec
	sent          prometheus.Counter
	staleAnswers  *prometheus.CounterVec
	fills         prometheus.Gauge
	fetched       *prometheus.CounterVec
	resumes       prometheus.Counter
	passedThrough prometheus.Counter
	refusals      *prometheus.CounterVec
	mirror        *Mirror

	completionBytes    prometheus.Counter
	completionFailures prometheus.Counter
}

var (
	upstreamRequests = prometheus.NewDesc("breakwater_upstream_requests_total",
		"Requests to an upstream by class (token, manifest, blob) and what they say of it.", []string{"registry", "upstream", "class", "verdict"}, nil)
	upstreamFirstByte = prometheus.NewDesc("breakwater_upstream_first_byte_seconds",
		"Time until an answer of an upstream began, redirects included, by class. Requests without one are not in it.", []string{"registry", "upstream", "class"}, nil)
	breakerState = prometheus.NewDesc("breakwater_breaker_state",
		"1 for the state that a breaker is in: closed, half-open or open.", []string{"registry", "upstream", "class", "state"}, nil)
	storeDegraded = prometheus.NewDesc("breakwater_store_degraded",
		"1 while the store cannot write: what is stored is served, the rest is passed through.", nil, nil)
	keepComplete = prometheus.NewDesc("breakwater_keep_complete",
		"1 if a kept image is stored with all its blobs, for its platforms. One of a private repository is called keep[0] if it is the first under keep in the configuration, and so on.", []string{"image"}, nil)
	keepAge = prometheus.NewDesc("breakwater_keep_age_seconds",
		"Seconds since an upstream last confirmed what a kept image's tag names; 0 for one that is kept by digest. Images are called as by breakwater_keep_complete.", []string{"image"}, nil)
	storeErrors = prometheus.NewDesc("breakwater_store_errors_total",
		"Operations of the store that have failed.", []string{"operation"}, nil)
)

// What the store tells of itself. Complete over known is the promise: what would survive an outage.
var (
	images      = prometheus.NewDesc("breakwater_images", "Images in the store; an index with its platforms is one.", nil, nil)
	complete    = prometheus.NewDesc("breakwater_images_complete", "Images of which all blobs are stored.", nil, nil)
	storeBytes  = prometheus.NewDesc("breakwater_store_bytes", "Disk space of what is stored.", nil, nil)
	storeOnWay  = prometheus.NewDesc("breakwater_store_reserved_bytes", "Disk space reserved for downloads that run or wait to be gone on with.", nil, nil)
	storeFiles  = prometheus.NewDesc("breakwater_store_contents", "Blobs and manifests in the store.", nil, nil)
	evictedDesc = prometheus.NewDesc("breakwater_evicted_images_total", "Images that had to go for want of space.", nil, nil)
	verified    = prometheus.NewDesc("breakwater_verified_bytes_total", "Bytes of the store that were hashed again.", nil, nil)
	quarantined = prometheus.NewDesc("breakwater_quarantined_files_total", "Files of the store that were taken out of service, since they were damaged.", nil, nil)
)

func newMetrics(m *Mirror) *metrics {
	s := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "breakwater_requests_total",
			Help: "Requests of clients by method, kind, status and how they were answered."}, []string{"method", "kind", "status", "cache"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "breakwater_request_duration_seconds",
			Help: "Time until a request was answered whole.", Buckets: []float64{.001, .005, .02, .1, .5, 1.5, 5, 10, 60, 600}}, []string{"kind"}),
		sent: prometheus.NewCounter(prometheus.CounterOpts{Name: "breakwater_sent_bytes_total",
			Help: "Bytes of body sent to clients."}),
		staleAnswers: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "breakwater_stale_answers_total",
			Help: "Answers given from the store because upstream did not confirm them."}, []string{"registry"}),
		fills: prometheus.NewGauge(prometheus.GaugeOpts{Name: "breakwater_fills",
			Help: "Downloads into the store that are in flight."}),
		fetched: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "breakwater_fetched_bytes_total",
			Help: "Bytes of blobs that came into the store, by whom they came from: upstream, or the shared store."}, []string{"source"}),
		resumes: prometheus.NewCounter(prometheus.CounterOpts{Name: "breakwater_resumes_total",
			Help: "Downloads that broke off and went on from there, at the same or another upstream."}),
		passedThrough: prometheus.NewCounter(prometheus.CounterOpts{Name: "breakwater_passed_through_total",
			Help: "Blobs that were sent to one client alone, since the store could not take them."}),
		refusals: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "breakwater_access_refusals_total",
			Help: "Requests that the access policy has refused: of who has shown nothing (unknown), or something wrong, or too much of that (busy), or may not have it (denied)."}, []string{"reason"}),
		completionBytes: prometheus.NewCounter(prometheus.CounterOpts{Name: "breakwater_completion_bytes_total",
			Help: "Bytes of blobs that were fetched before a client asked for them."}),
		completionFailures: prometheus.NewCounter(prometheus.CounterOpts{Name: "breakwater_completion_failures_total",
			Help: "Times that an image could not be completed; it is tried again."}),
		mirror: m,
	}
	waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "breakwater_completion_images",
		Help: "Images that are being completed, or wait for it."}, func() float64 { return float64(m.completions.count()) })
	refused := prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "breakwater_refused_addresses_total",
		Help: "Connections that were not made, since an upstream or a name led to an address that is not public."},
		func() float64 { return float64(m.pool.Refused()) })
	s.registry.MustRegister(refused, s.requests, s.seconds, s.sent, s.staleAnswers, s.fills, s.fetched, s.resumes, s.passedThrough, s.refusals, waiting, s.completionBytes, s.completionFailures, s,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if m.fleet != nil {
		s.registry.MustRegister(m.fleet)
	}
	return s
}

// request counts one that has been answered.
func (s *metrics) request(method string, kind kind, w *response, duration time.Duration) {
	if method != http.MethodGet && method != http.MethodHead {
		method = "other"
	}
	s.requests.WithLabelValues(method, kind.String(), strconv.Itoa(w.status), cacheLabel(w.cache)).Inc()
	s.seconds.WithLabelValues(kind.String()).Observe(duration.Seconds())
	s.sent.Add(float64(w.sent))
}

// cacheLabel is what of a Cache-Status has few values.
func cacheLabel(status string) string {
	_, rest, _ := strings.Cut(status, "; ")
	first, _, _ := strings.Cut(rest, ";")
	if first == "" {
		return "none"
	}
	return first
}

// Describe is for prometheus.Collector.
func (s *metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- upstreamRequests
	ch <- upstreamFirstByte
	ch <- breakerState
	ch <- storeDegraded
	ch <- storeErrors
	ch <- keepComplete
	ch <- keepAge
	for _, desc := range []*prometheus.Desc{images, complete, storeBytes, storeOnWay, storeFiles, evictedDesc, verified, quarantined} {
		ch <- desc
	}
}

// Collect is for prometheus.Collector: what the upstreams and the store count by themselves, and how
// what is kept does.
func (s *metrics) Collect(ch chan<- prometheus.Metric) {
	degraded := 0.0
	if s.mirror.store.Trouble() != nil {
		degraded = 1
	}
	ch <- prometheus.MustNewConstMetric(storeDegraded, prometheus.GaugeValue, degraded)
	for operation, n := range s.mirror.store.Errors() {
		ch <- prometheus.MustNewConstMetric(storeErrors, prometheus.CounterValue, float64(n), operation)
	}
	u := s.mirror.store.Usage()
	for desc, value := range map[*prometheus.Desc]int64{images: int64(u.Images), complete: int64(u.Complete),
		storeBytes: u.Bytes, storeOnWay: u.Reserved, storeFiles: int64(u.Contents)} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(value))
	}
	for desc, value := range map[*prometheus.Desc]int64{evictedDesc: u.Evicted, verified: u.Verified, quarantined: u.Wrong} {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value))
	}
	kept, labels := s.mirror.keepers.labels()
	for i, k := range kept {
		complete := 0.0
		if k.complete.Load() {
			complete = 1
		}
		ch <- prometheus.MustNewConstMetric(keepComplete, prometheus.GaugeValue, complete, labels[i])
		if age, known := k.age(); known {
			ch <- prometheus.MustNewConstMetric(keepAge, prometheus.GaugeValue, age.Seconds(), labels[i])
		}
	}
	for _, c := range s.mirror.pool.All() {
		for _, h := range c.Health() {
			labels := []string{c.Registry(), c.Upstream(), h.Class}
			for verdict, n := range map[string]int64{"success": h.Succeeded, "failure": h.Failed, "excluded": h.Excluded} {
				ch <- prometheus.MustNewConstMetric(upstreamRequests, prometheus.CounterValue, float64(n), append(labels, verdict)...)
			}
			f := h.FirstBytes
			ch <- prometheus.MustNewConstHistogram(upstreamFirstByte, f.Count, f.Seconds, f.Within, labels...)
			for _, state := range []string{"closed", "half-open", "open"} {
				value := 0.0
				if state == h.State {
					value = 1
				}
				ch <- prometheus.MustNewConstMetric(breakerState, prometheus.GaugeValue, value, append(labels, state)...)
			}
		}
	}
}

// Admin is the handler of the admin listener, GET only: /healthz says that the process answers,
// /readyz which upstreams are out and whether the store can write (neither is a reason not to be ready),
// /metrics the rest.
func (m *Mirror) Admin() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.metrics.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", m.serveReady)
	return mux
}
