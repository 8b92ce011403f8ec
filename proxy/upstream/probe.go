package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// The probes try a sick upstream in the users' place, on the path that users take, with content that
// it is known to have had (DESIGN 8). GET /v2/ alone would say nothing of manifests or blobs. Each
// goes over a connection of its own.

func (c *Client) probeToken(ctx context.Context) error {
	return c.auth.probe(ctx)
}

func (c *Client) probeManifest(ctx context.Context) error {
	ref := c.good[0].Load()
	if ref == nil {
		return errNoProbe
	}
	return c.probeWith(ctx, query{http.MethodHead, classManifest, *ref, "/manifests/" + ref.Identifier(), manifestAccept})
}

func (c *Client) probeBlob(ctx context.Context) error {
	ref := c.good[1].Load()
	if ref == nil {
		return errNoProbe
	}
	return c.probeWith(ctx, query{http.MethodGet, classBlob, *ref, "/blobs/" + ref.Digest.String(), nil})
}

// probeWith asks past the breaker, which is what is being decided.
func (c *Client) probeWith(ctx context.Context, q query) error {
	if c.hold.left(time.Now()) > 0 {
		return errNoProbe // not before it wants to be asked again
	}
	c.http.CloseIdleConnections()
	resp, err := c.authorized(ctx, q)
	if err == nil {
		err = c.judge(q.class, resp)
	}
	if err != nil {
		return probed(err)
	}
	defer resp.Body.Close()
	_, err = io.CopyN(io.Discard, resp.Body, verdictBytes)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return err
}

// probed is what an error says as the outcome of a probe: a 429 or a refusal says nothing.
func probed(err error) error {
	e := new(Error)
	switch {
	case !errors.As(err, &e):
		return err
	case e.verdict == success:
		return nil
	case e.verdict == excluded:
		return fmt.Errorf("%w: %w", errNoProbe, err)
	}
	return e
}
