package proxy

import (
	"net/url"
	"strings"
	"testing"
)

// What is taken from a Link is a query and nothing else: put behind a path of ours, it changes no
// host, no path, no line of the request.
func FuzzLink(f *testing.F) {
	for _, seed := range []string{`</v2/org/app/tags/list?last=a&n=5>; rel="next"`, `<https://evil.test/v2/?x=1#y>; rel=next`, `<?a=b>; rel="next"; rel="prev"`, `<//user@evil.test?a>;rel=next`,
		`<?a b>; rel=next`, `<?a%zz;b=c>; rel=next`, `<?>; rel=next`, `rel=next`, "<?a\x00>; rel=next", `</x?y>, </z?w>; rel=next`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, link string) {
		next := nextQuery(link)
		if next == "" {
			return
		}
		const ours = "https://quay.test/v2/org/app/referrers/x"
		u, err := url.Parse(ours + "?" + next)
		if err != nil {
			t.Fatalf("%q leads to %q, which is no query: %v", link, next, err)
		}
		if u.RawQuery != next || u.Fragment != "" || u.Host != "quay.test" || u.Path != "/v2/org/app/referrers/x" {
			t.Errorf("%q leads to %s", link, u)
		}
		if i := strings.IndexFunc(next, func(r rune) bool { return r <= ' ' || r > '~' }); i >= 0 {
			t.Errorf("%q leads to %q, with %q in it", link, next, next[i])
		}
		if len(next) > maxQuery {
			t.Errorf("%d bytes of query", len(next))
		}
	})
}
