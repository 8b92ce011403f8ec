package registrytest

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"breakwater/pkg/oci"

	"github.com/distribution/distribution/v3/registry/api/errcode"
)

// Auth is what the registry asks of those who pull. The zero Auth asks nothing.
type Auth struct {
	Scheme string // "", "Basic", or "Bearer"
	// Realm is the token endpoint: any address of the Registry, with the path /token. "" is /token at
	// the host that was asked.
	Realm   string
	Service string
	// Users are those who may pull everything, with their passwords. Everybody else may pull Public,
	// and everything if there are no Users.
	Users  map[string]string
	Public []string // repositories
	// ExpiresIn is the life of a token. 0 is 60 s, and not said in the answer.
	ExpiresIn time.Duration
}

// grant is what a token is good for.
type grant struct {
	repositories []string
	expires      time.Time
}

// may reports whether user, "" for anybody, may pull repo.
func (a Auth) may(user, repo string) bool {
	return user != "" || len(a.Users) == 0 || slices.Contains(a.Public, repo)
}

// Revoke makes all tokens that were given out worthless.
func (g *Registry) Revoke() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.tokens)
}

// authorize answers 401 itself and returns false if the request must not go on. repo is "" for /v2/.
func (g *Registry) authorize(w http.ResponseWriter, r *http.Request, auth Auth, repo string) bool {
	problem := ""
	switch auth.Scheme {
	case "":
		return true
	case "Basic":
		user, err := auth.user(r)
		if err == nil && (user != "" || repo != "" && auth.may("", repo)) {
			return true
		}
		w.Header().Set("Www-Authenticate", fmt.Sprintf("Basic realm=%q", auth.Service))
	default:
		if problem = g.checkToken(r, repo); problem == "" {
			return true
		}
		w.Header().Set("Www-Authenticate", auth.challenge(r, repo, problem))
	}
	oci.WriteError(w, oci.NewError(errcode.ErrorCodeUnauthorized, "authentication required: %s", problem))
	return false
}

// user is the name of the caller, "" for one who gives none.
func (a Auth) user(r *http.Request) (string, error) {
	name, password, given := r.BasicAuth()
	if !given {
		return "", nil
	}
	if want, known := a.Users[name]; !known || password != want {
		return "", fmt.Errorf("no user %q with that password", name)
	}
	return name, nil
}

// checkToken is what is wrong with the request's token, as a challenge's error says it (RFC 6750,
// section 3.1), or "".
func (g *Registry) checkToken(r *http.Request, repo string) string {
	token, given := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !given {
		return "no_token"
	}
	g.mu.Lock()
	grant, known := g.tokens[token]
	g.mu.Unlock()
	switch {
	case !known || !time.Now().Before(grant.expires):
		return "invalid_token"
	case repo != "" && !slices.Contains(grant.repositories, repo):
		return "insufficient_scope"
	}
	return ""
}

func (a Auth) challenge(r *http.Request, repo, problem string) string {
	realm := a.Realm
	if realm == "" {
		scheme := "http"
		if r.TLS != nil {
			scheme = "https"
		}
		realm = scheme + "://" + r.Host + "/token"
	}
	challenge := fmt.Sprintf("Bearer realm=%q,service=%q", realm, a.Service)
	if repo != "" {
		challenge += fmt.Sprintf(",scope=%q", "repository:"+repo+":pull")
	}
	if problem != "no_token" {
		challenge += fmt.Sprintf(",error=%q", problem)
	}
	return challenge
}

// serveToken gives a token for as much of the scope as the caller may have, as Docker Hub does; a
// wrong password is a 401.
func (g *Registry) serveToken(w http.ResponseWriter, r *http.Request, auth Auth) {
	user, err := auth.user(r)
	if err != nil {
		oci.WriteError(w, oci.NewError(errcode.ErrorCodeUnauthorized, "%s", err))
		return
	}
	life := auth.ExpiresIn
	if life == 0 {
		life = time.Minute
	}
	given := grant{expires: time.Now().Add(life)}
	for _, scopes := range r.URL.Query()["scope"] {
		for scope := range strings.FieldsSeq(scopes) {
			repo, found := strings.CutPrefix(scope, "repository:")
			repo, actions := cutLast(repo, ":")
			if found && slices.Contains(strings.Split(actions, ","), "pull") && auth.may(user, repo) {
				given.repositories = append(given.repositories, repo)
			}
		}
	}
	token := Canary + rand.Text()
	g.mu.Lock()
	g.tokens[token] = given
	g.mu.Unlock()
	answer := map[string]any{"token": token, "access_token": token, "issued_at": time.Now().UTC().Format(time.RFC3339)}
	if auth.ExpiresIn > 0 {
		answer["expires_in"] = int(auth.ExpiresIn / time.Second)
	}
	writeJSON(w, r, "application/json", answer)
}
