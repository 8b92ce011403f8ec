package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"
)

// source is who may have a blob: an upstream, in the name of a repository, or the fleet's shared store.
type source struct {
	ref    oci.Reference
	client *upstream.Client // nil for the shared store
	err    error            // why it is of no use; guarded by the fill's mu
}

// sources are those of a reference, in the order in which they are asked.
func (m *Mirror) sources(ref oci.Reference) ([]*source, error) {
	clients, err := m.upstreams(ref)
	if err != nil {
		return nil, err
	}
	var sources []*source
	if m.fleet != nil {
		sources = append(sources, &source{ref: ref})
	}
	for _, client := range clients {
		sources = append(sources, &source{ref: ref, client: client})
	}
	return sources, nil
}

// clients are those of the sources, nil for the shared store.
func clientsOf(sources []*source) []*upstream.Client {
	var clients []*upstream.Client
	for _, src := range sources {
		clients = append(clients, src.client)
	}
	return clients
}

// name is what answers and logs call it.
func (s *source) name() string {
	if s.client == nil {
		return sharedName
	}
	return s.client.Upstream()
}

// kind is what metrics call it.
func (s *source) kind() string {
	if s.client == nil {
		return "shared"
	}
	return "upstream"
}

// cache is what Cache-Status says of what it brings.
func (s *source) cache() string {
	if s.client == nil {
		return cacheShared
	}
	return cacheFetched
}

// is reports whether both are the same for a fill.
func (s *source) is(other *source) bool { return s.ref == other.ref && s.client == other.client }

// open opens the blob from offset on. It is had once there is something of it for the readers, and not with
// its headers: a CDN that sends those and stalls must not keep the next source from being asked.
func (s *source) open(ctx context.Context, m *Mirror, offset int64) (*body, error) {
	var b *body
	if s.client == nil {
		var err error
		if b, err = m.fleet.open(ctx, s.ref, offset); err != nil {
			return nil, err
		}
	} else {
		from, err := s.client.Blob(ctx, s.ref, offset)
		if err != nil {
			return nil, err
		}
		b = &body{ReadCloser: from, size: from.Size, confirmation: confirmation(s.client)}
	}
	first := int64(1)
	switch {
	case b.size < 0:
		first = storage.Withheld + 1
	case b.size <= storage.Withheld:
		first = b.size - offset
	}
	if err := b.prime(first); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// stat asks for the blob's size, -1 if it is not told.
func (s *source) stat(ctx context.Context, m *Mirror) (int64, error) {
	if s.client == nil {
		content, err := m.fleet.content(ctx, s.ref)
		return content.Size, err
	}
	return s.client.StatBlob(ctx, s.ref)
}

// mismatch holds wrong content against it.
func (s *source) mismatch(m *Mirror) {
	if s.client == nil {
		m.fleet.distrust(s.ref)
		return
	}
	s.client.Mismatch(s.ref)
}

// lied is the error of a source that sent other bytes than the digest names.
func (s *source) lied(err error) error {
	return &upstream.Error{Upstream: s.name(), Class: "blob", Reason: "sent wrong content", Err: err}
}

// logSource says why a source did not deliver: a warning if it has failed, nothing much if it does not
// have the blob, since the client is told, or was not asked, since its breaker has said so.
func (m *Mirror) logSource(ctx context.Context, src *source, err error) {
	level := slog.LevelWarn
	if up := new(upstream.Error); errors.As(err, &up) && (!up.Outage() || up.State == "open" || up.State == "held off") || errors.As(err, new(*sharedError)) {
		level = slog.LevelDebug // the shared store says itself when it is out
	}
	m.logger.Log(ctx, level, "blob not had", "repository", src.ref.Repository, "digest", src.ref.Digest, "upstream", src.name(), "err", err)
}

// primeBuffer is room for what has come with the first byte.
const primeBuffer = 32 << 10

// body is a blob on its way from a source.
type body struct {
	io.ReadCloser
	size         int64 // of the whole blob; -1 if the source did not say
	confirmation storage.Confirmation
	ahead        []byte // read by prime, to be read again
	end          error  // that prime met behind it
	cancel       func() // ends what it takes besides; nil if there is nothing
}

// Close ends it. It may be called twice.
func (b *body) Close() error {
	if b.cancel != nil {
		b.cancel()
	}
	return b.ReadCloser.Close()
}

// prime waits until the first n bytes have come, or all if they are fewer. They can still be read.
func (b *body) prime(n int64) error {
	buf := make([]byte, max(n, primeBuffer))
	for int64(len(b.ahead)) < n && b.end == nil {
		var more int
		more, b.end = b.ReadCloser.Read(buf[len(b.ahead):])
		b.ahead = buf[:len(b.ahead)+more]
	}
	if int64(len(b.ahead)) >= n || errors.Is(b.end, io.EOF) {
		return nil
	}
	return b.end
}

// Read is the source's.
func (b *body) Read(p []byte) (int, error) {
	if len(b.ahead) > 0 {
		n := copy(p, b.ahead)
		if b.ahead = b.ahead[n:]; len(b.ahead) == 0 {
			b.ahead = nil
		}
		return n, nil
	}
	if b.end != nil {
		return 0, b.end
	}
	return b.ReadCloser.Read(p)
}

// openBody opens the blob at the first of the sources that open succeeds with.
func (m *Mirror) openBody(ctx context.Context, sources []*source, open func(context.Context, *source) (*body, error)) (*body, *source, error) {
	r := &race[*body]{
		tasks:   m.filling,
		clients: clientsOf(sources),
		ask: func(ctx context.Context, i int) (*body, error) {
			body, err := open(ctx, sources[i])
			if err != nil {
				m.logSource(ctx, sources[i], err)
			}
			return body, err
		},
		drop: func(body *body) { body.Close() },
	}
	body, i, err := r.run(ctx)
	return body, sources[i], err
}

// sizeOf settles how long the blob is, -1 if nobody can tell. A length that contradicts the manifest
// is refused before a byte of it is released.
func (m *Mirror) sizeOf(ctx context.Context, src *source, body *body) (int64, error) {
	size := body.size
	if size < 0 {
		stat, err := src.stat(ctx, m)
		if err == nil {
			size = stat
		}
	}
	expected, known := m.expected.size(src.ref)
	switch {
	case size < 0 && known:
		return expected, nil
	case known && size != expected:
		src.mismatch(m)
		return 0, src.lied(fmt.Errorf("%d bytes announced where the manifest says %d", size, expected))
	}
	return size, nil
}
