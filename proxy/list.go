package proxy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"breakwater/pkg/oci"
	"breakwater/proxy/upstream"
	"breakwater/storage"

	"github.com/distribution/distribution/v3/registry/api/errcode"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxPage is the largest n of a tag list that is passed on (CVE-2023-2253, CVE-2020-29662).
	maxPage = 1000
	// referrersPatience replaces revalidate_timeout for them: a pull asks once for each manifest of an
	// index, one after the other.
	referrersPatience = 500 * time.Millisecond
	// maxPages is how many pages of referrers are put together.
	maxPages = 16
)

// tagList is the answer to a tags/list request.
type tagList struct {
	Name string   `json:"name"`
	Tags []string `json:"tags"`
}

// serveTags sends a page of a repository's tags: upstream's, or the stored one while it is out.
func (m *Mirror) serveTags(w *response, r *http.Request, t target) error {
	query := url.Values{}
	for name, values := range t.query {
		if name != "ns" { // some upstreams answer 400 to it
			query[name] = values
		}
	}
	if s := query.Get("n"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			return oci.NewError(errcode.ErrorCodePaginationNumberInvalid, "n=%.20q is not a number of tags", s)
		}
		query.Set("n", strconv.Itoa(min(n, maxPage)))
	}
	path := "/tags/list"
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	answer, how, err := m.list(r.Context(), t, path, m.askTags)
	if err != nil {
		return err
	}
	if answer.Link != "" {
		next, err := url.ParseQuery(answer.Link)
		if err == nil {
			if next.Del("ns"); t.ns != "" { // ours, never one that upstream names
				next.Set("ns", t.ns)
			}
			w.Header().Set("Link", "<"+(&url.URL{Path: r.URL.Path, RawQuery: next.Encode()}).String()+`>; rel="next"`)
		}
	}
	if err := how.mark(w); err != nil {
		return err
	}
	w.Header().Set("Content-Type", answer.MediaType)
	w.sendBytes(r, answer.Body)
	return nil
}

// asker gets a list from upstream.
type asker func(ctx context.Context, client *upstream.Client, t target, path string) (storage.Answer, error)

// list is a list by the same contract as a tag.
func (m *Mirror) list(ctx context.Context, t target, path string, ask asker) (storage.Answer, provenance, error) {
	stored, err := m.storedAnswer(t, path)
	if err != nil && t.kind == kindReferrers && m.fleet != nil {
		m.fleet.hearReferring(ctx, t.ref)
		stored, err = m.storedAnswer(t, path)
	}
	if err == nil && m.fresh(t.ref, stored.ValidatedAt) {
		return stored, provenance{cache: cacheHit}, nil
	}
	have := m.standby(t, stored.ValidatedAt)
	if t.kind == kindReferrers {
		have.patience = min(have.patience, referrersPatience)
	}
	answer, how, err := revalidate(ctx, m, t, have, m.askList(t, path, ask))
	if errors.Is(err, errUseStored) {
		return stored, how, nil
	}
	return answer, how, err
}

// askList asks the upstreams for a list, and stores it.
func (m *Mirror) askList(t target, path string, ask asker) *question[storage.Answer] {
	return m.lists.join(m.asking, t.ref.Repository.String()+path, func(ctx context.Context) (storage.Answer, error) {
		answer, err := first(ctx, m, t.ref, func(ctx context.Context, client *upstream.Client) (storage.Answer, error) {
			answer, err := ask(ctx, client, t, path)
			answer.ValidatedAt, answer.Upstream = time.Now(), client.Upstream()
			if !m.shares(client, t.ref.Repository) {
				answer.Credential = client.Credential()
			}
			return answer, err
		})
		if err != nil {
			return answer, err
		}
		if err := m.store.PutAnswer(t.ref.Repository, path, answer); err != nil {
			m.logNotStored("list not stored", err, "repository", t.ref.Repository, "reference", path)
		}
		return answer, nil
	})
}

func (m *Mirror) askTags(ctx context.Context, client *upstream.Client, t target, path string) (storage.Answer, error) {
	var tags tagList
	list, err := client.List(ctx, t.ref.Repository, path, func(list upstream.List) error {
		err := json.Unmarshal(list.Body, &tags)
		if err == nil && tags.Name == "" && tags.Tags == nil {
			err = errors.New("neither a name nor tags in it")
		}
		return err
	})
	if err != nil {
		return storage.Answer{}, err
	}
	tags.Name = t.ref.Name // not what it is called upstream
	if tags.Tags == nil {
		tags.Tags = []string{}
	}
	body, err := json.Marshal(tags)
	return storage.Answer{Body: body, MediaType: "application/json", Link: nextQuery(list.Link)}, err
}

// nextQuery is the query of a Link to the next page, "" if there is none. Nothing else of a Link is
// ever used, so it cannot name a host or a path (GHSA-h7vf-4x9w-h99v).
func nextQuery(link string) string {
	target, params, ok := strings.Cut(link, ">")
	if !ok || !strings.HasPrefix(target, "<") || !strings.Contains(strings.ReplaceAll(params, `"`, ""), "rel=next") {
		return ""
	}
	u, err := url.Parse(target[1:])
	if err != nil {
		return ""
	}
	next := u.Query().Encode() // as sent it may hold a space, which ends a request line
	if len(next) > maxQuery {
		return ""
	}
	return next
}

// serveReferrers sends the index of what refers to a manifest. Docker 29 asks for it in the middle of
// a pull, and gives the pull up on any error but 404: for a stored manifest there is always an answer.
func (m *Mirror) serveReferrers(w *response, r *http.Request, t target) error {
	ctx, cancel := context.WithTimeout(r.Context(), m.referrersBudget(t))
	defer cancel()
	path := referrersPath(t.ref.Digest)
	answer, how, err := m.list(ctx, t, path, m.askReferrers)
	if err != nil && !errors.Is(err, errClientGone) {
		if _, absent := m.store.Manifest(t.ref.Repository, t.ref.Digest); absent != nil || m.withheld(t, t.ref.Digest) {
			return err
		}
		how = provenance{cache: "breakwater; fwd=uri-miss; detail=unknown", warning: "referrers are not known: " + oci.AsError(err).Message}
		answer = storage.Answer{Body: marshalIndex(nil), MediaType: ispec.MediaTypeImageIndex}
		if stored, unknown := m.storedAnswer(t, path); unknown == nil { // refused, or too old
			answer, how.age = stored, time.Since(stored.ValidatedAt)
			how.cache, how.warning = "breakwater; fwd=stale; detail=refused", "stale: "+oci.AsError(err).Message
		}
	} else if err != nil {
		return err
	}
	if artifactType := t.query.Get("artifactType"); artifactType != "" {
		if answer.Body, err = filterIndex(answer.Body, artifactType); err != nil {
			return err
		}
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	if err := how.mark(w); err != nil {
		return err
	}
	w.Header().Set("Content-Type", answer.MediaType)
	w.sendBytes(r, answer.Body)
	return nil
}

// referrersPath is what a manifest's referrers are asked for and stored by.
func referrersPath(dgst digest.Digest) string { return "/referrers/" + dgst.String() }

// referrersBudget is how long a list may take that nothing is stored of.
func (m *Mirror) referrersBudget(t target) time.Duration {
	if _, absent := m.store.Manifest(t.ref.Repository, t.ref.Digest); absent != nil {
		return headerBudget
	}
	return patienceInAll // it is asked for in the middle of a pull
}

// askReferrers asks the referrers API and, where a registry has none, the tag that stands in for it
// (distribution-spec, "Listing Referrers" and "Referrers Tag Schema").
func (m *Mirror) askReferrers(ctx context.Context, client *upstream.Client, t target, path string) (storage.Answer, error) {
	all := []ispec.Descriptor{}
	next := path
	for page := 0; next != "" && page < maxPages; page++ {
		var index oci.Manifest
		list, err := client.List(ctx, t.ref.Repository, next, func(list upstream.List) (err error) {
			if index, err = oci.ParseManifest(list.MediaType, list.Body, digest.SHA256); err == nil && !index.IsIndex() {
				err = errors.New("not an index")
			}
			return err
		})
		if err != nil {
			e := new(upstream.Error)
			if page == 0 && errors.As(err, &e) && e.Status >= 400 && e.Status < 500 && !e.Outage() || page == 0 && unsupported(e) {
				return m.askReferrersTag(ctx, client, t)
			}
			return storage.Answer{}, err
		}
		if page == 0 && list.Link == "" {
			return storage.Answer{Body: list.Body, MediaType: ispec.MediaTypeImageIndex}, nil
		}
		all = append(all, index.Manifests...)
		if next = nextQuery(list.Link); next != "" {
			next = path + "?" + next
		}
	}
	return storage.Answer{Body: marshalIndex(all), MediaType: ispec.MediaTypeImageIndex}, nil
}

// unsupported reports whether the answer means that there is no such API.
func unsupported(e *upstream.Error) bool {
	return e.Status == http.StatusBadRequest || e.Status == http.StatusMethodNotAllowed || e.Status == http.StatusNotImplemented
}

func (m *Mirror) askReferrersTag(ctx context.Context, client *upstream.Client, t target) (storage.Answer, error) {
	tag := t.ref.Digest.Algorithm().String() + "-" + t.ref.Digest.Encoded()
	index, err := client.Manifest(ctx, oci.Reference{Repository: t.ref.Repository, Tag: tag})
	if e := new(upstream.Error); errors.As(err, &e) && e.Kind == upstream.NotFound || err == nil && !index.IsIndex() {
		return storage.Answer{Body: marshalIndex(nil), MediaType: ispec.MediaTypeImageIndex}, nil
	}
	return storage.Answer{Body: index.Raw, MediaType: ispec.MediaTypeImageIndex}, err
}

func marshalIndex(manifests []ispec.Descriptor) []byte {
	if manifests == nil {
		manifests = []ispec.Descriptor{}
	}
	body, err := json.Marshal(ispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ispec.MediaTypeImageIndex, Manifests: manifests})
	if err != nil {
		return []byte("{}") // a struct of strings and numbers always marshals
	}
	return body
}

// filterIndex keeps what has that artifact type.
func filterIndex(body []byte, artifactType string) ([]byte, error) {
	var index ispec.Index
	if err := json.Unmarshal(body, &index); err != nil {
		return nil, fmt.Errorf("filter referrers: %w", err)
	}
	var kept []ispec.Descriptor
	for _, desc := range index.Manifests {
		if desc.ArtifactType == artifactType {
			kept = append(kept, desc)
		}
	}
	return marshalIndex(kept), nil
}
