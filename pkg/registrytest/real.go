package registrytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem" // found by its name in the configuration
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"   // the same
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
)

// Real is distribution's registry, in this process on loopback, over HTTP and open to all. It keeps
// the same log as a [Registry] does, and suffers the same faults.
//
// It leaves one goroutine behind, github.com/docker/go-events.(*Broadcaster).run.
type Real struct {
	URL string // also after a Restart
	script
	app     http.Handler
	address string
	server  *Server // nil while it is stopped
}

// NewReal starts a registry that keeps its content in a folder, or in memory if dir is "".
func NewReal(dir string) (r *Real, err error) {
	defer func() {
		if p := recover(); p != nil { // how NewApp refuses a configuration
			err = fmt.Errorf("start distribution's registry: %v", p)
		}
	}()
	logrus.SetLevel(logrus.PanicLevel) // there is no other way to its log
	storage := configuration.Storage{
		"inmemory":    {},
		"delete":      {"enabled": true},
		"maintenance": {"uploadpurging": map[any]any{"enabled": false}},
	}
	if dir != "" {
		delete(storage, "inmemory")
		storage["filesystem"] = configuration.Parameters{"rootdirectory": dir}
	}
	config := &configuration.Configuration{Storage: storage}
	config.HTTP.Secret = "registrytest"
	config.Validation.Disabled = true // an index may be pushed without all of its images
	config.Catalog.MaxEntries = 1000
	r = &Real{app: handlers.NewApp(context.Background(), config), address: "127.0.0.1:0"}
	return r, r.Restart()
}

// ServeHTTP answers one request, as the rules want it or as distribution does.
func (r *Real) ServeHTTP(w http.ResponseWriter, req *http.Request) { r.play(w, req, r.app) }

// Restart starts to listen, on the same port as before, if the registry is stopped.
func (r *Real) Restart() error {
	if r.server != nil {
		return nil
	}
	l, err := net.Listen("tcp", r.address)
	if err != nil {
		return fmt.Errorf("start distribution's registry: %w", err)
	}
	r.address = l.Addr().String()
	r.server = Serve(l, r)
	r.URL = r.server.URL
	return nil
}

// Close cuts all connections and listens no more; the content stays for a Restart.
func (r *Real) Close() error {
	if r.server == nil {
		return nil
	}
	err := r.server.Close()
	r.server = nil
	return err
}

// Push uploads an image, with all that it reaches, to any registry by the API: to base, such as
// [Real]'s URL. Without a tag if tag is "".
func Push(ctx context.Context, base, repo, tag string, image Image) error {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	p := pusher{client: &http.Client{Transport: transport}, base: base + "/v2/" + repo}
	if err := p.push(ctx, tag, image); err != nil {
		return fmt.Errorf("push %s to %s: %w", image.Digest(), p.base, err)
	}
	return nil
}

type pusher struct {
	client *http.Client
	base   string // with the repository
}

func (p pusher) push(ctx context.Context, tag string, image Image) error {
	for _, child := range image.Images {
		if err := p.push(ctx, "", child); err != nil {
			return err
		}
	}
	for _, blob := range image.Blobs {
		if err := p.upload(ctx, blob.Digest, blob.Bytes); err != nil {
			return err
		}
	}
	if tag == "" {
		tag = image.Digest().String()
	}
	_, err := p.send(ctx, http.MethodPut, p.base+"/manifests/"+tag, image.MediaType, image.Raw)
	return err
}

// upload sends a blob in one piece (distribution-spec, "POST then PUT").
func (p pusher) upload(ctx context.Context, dgst digest.Digest, raw []byte) error {
	location, err := p.send(ctx, http.MethodPost, p.base+"/blobs/uploads/", "", nil)
	if err != nil {
		return err
	}
	if location == nil {
		return errors.New("the registry did not say where to upload to")
	}
	query := location.Query()
	query.Set("digest", dgst.String())
	location.RawQuery = query.Encode()
	_, err = p.send(ctx, http.MethodPut, location.String(), "application/octet-stream", raw)
	return err
}

// send returns the Location of a success.
func (p pusher) send(ctx context.Context, method, target, mediaType string, body []byte) (*url.URL, error) {
	req, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 300 {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return nil, fmt.Errorf("%s %s: %s: %s", method, target, resp.Status, text)
	}
	location, err := resp.Location()
	if errors.Is(err, http.ErrNoLocation) {
		return nil, nil
	}
	return location, err
}
