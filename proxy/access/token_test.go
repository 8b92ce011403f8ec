package access

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// keys are a token server's.
type keys struct {
	rsa     *rsa.PrivateKey
	ec      *ecdsa.PrivateKey
	ed      ed25519.PrivateKey
	foreign *ecdsa.PrivateKey
}

func newKeys(t testing.TB) keys {
	t.Helper()
	var k keys
	var errs [4]error
	k.rsa, errs[0] = rsa.GenerateKey(rand.Reader, 2048)
	k.ec, errs[1] = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	_, k.ed, errs[2] = ed25519.GenerateKey(rand.Reader)
	k.foreign, errs[3] = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	return k
}

// jwks is the file of the public ones; pemFile is the same otherwise.
func (k keys) jwks(t testing.TB) string {
	t.Helper()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: k.rsa.Public(), KeyID: "rsa", Algorithm: "RS256"}, {Key: k.ec.Public(), KeyID: "ec"}, {Key: k.ed.Public(), KeyID: "ed"}}}
	raw, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return write(t, filepath.Join(t.TempDir(), "keys.json"), string(raw))
}

func publicPEM(t testing.TB, keys ...crypto.PublicKey) string {
	t.Helper()
	var text strings.Builder
	for _, key := range keys {
		raw, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: raw}))
	}
	return text.String()
}

// said is what a good token says.
func said() map[string]any {
	now := time.Now()
	return map[string]any{
		"iss": "auth.test", "sub": "ci", "aud": "mirror.test", "exp": now.Add(5 * time.Minute).Unix(), "nbf": now.Unix(), "iat": now.Unix(), "jti": "x",
		"access": []map[string]any{{"type": "repository", "name": "quay.io/org/app", "actions": []string{"pull"}}, {"type": "repository", "name": "quay.io/org/pushed", "actions": []string{"push", "delete"}},
			{"type": "repository", "name": "quay.io/org/all", "actions": []string{"*"}}, {"type": "repository", "name": "quay.io/org/none", "actions": []string{}}, {"type": "registry", "name": "all", "actions": []string{"*"}},
			{"type": "registry", "name": "catalog", "actions": []string{"pull"}}},
	}
}

func sign(t testing.TB, key jose.SigningKey, claims map[string]any, options *jose.SignerOptions) string {
	t.Helper()
	signer, err := jose.NewSigner(key, options)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func bearer(token string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/v2/", nil)
	r.Header.Set("Authorization", "Bearer "+token)
	return r
}

func TestTokens(t *testing.T) {
	k := newKeys(t)
	pems := write(t, filepath.Join(t.TempDir(), "keys.pem"), publicPEM(t, k.rsa.Public(), k.ec.Public(), k.ed.Public()))
	shared := []byte(publicPEM(t, k.rsa.Public())) // what is public, taken for a secret
	ec := jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.ec, KeyID: "ec"}}
	with := func(name string, value any) map[string]any {
		claims := said()
		if claims[name] = value; value == nil {
			delete(claims, name)
		}
		return claims
	}
	now := time.Now()
	good := sign(t, ec, said(), nil)
	parts := strings.Split(good, ".")
	encoded := func(v string) string { return base64.RawURLEncoding.EncodeToString([]byte(v)) }
	forged, err := json.Marshal(with("sub", "root"))
	if err != nil {
		t.Fatal(err)
	}
	right := map[string]string{
		"ES256":               good,
		"RS256":               sign(t, jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: k.rsa, KeyID: "rsa"}}, said(), nil),
		"EdDSA":               sign(t, jose.SigningKey{Algorithm: jose.EdDSA, Key: jose.JSONWebKey{Key: k.ed, KeyID: "ed"}}, said(), nil),
		"no name of a key":    sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: k.ec}, said(), nil),
		"another key's name":  sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.ec, KeyID: "elsewhere"}}, said(), nil),
		"several audiences":   sign(t, ec, with("aud", []string{"other.test", "mirror.test"}), nil),
		"half a minute ago":   sign(t, ec, with("exp", now.Add(-30*time.Second).Unix()), nil),
		"half a minute ahead": sign(t, ec, with("nbf", now.Add(30*time.Second).Unix()), nil),
	}
	wrong := map[string]string{
		"nothing":                "",
		"no token":               "x",
		"the client's Hub token": secret,
		"another issuer":         sign(t, ec, with("iss", "evil.test"), nil),
		"no issuer":              sign(t, ec, with("iss", nil), nil),
		"another audience":       sign(t, ec, with("aud", "other.test"), nil),
		"no audience":            sign(t, ec, with("aud", nil), nil),
		"run out":                sign(t, ec, with("exp", now.Add(-2*time.Minute).Unix()), nil),
		"never runs out":         sign(t, ec, with("exp", nil), nil),
		"not good yet":           sign(t, ec, with("nbf", now.Add(2*time.Minute).Unix()), nil),
		"another key":            sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: k.foreign}, said(), nil),
		"another key, our name":  sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: k.foreign, KeyID: "ec"}}, said(), nil),
		"brings its key along":   sign(t, jose.SigningKey{Algorithm: jose.ES256, Key: k.foreign}, said(), &jose.SignerOptions{EmbedJWK: true}),
		"public key as secret":   sign(t, jose.SigningKey{Algorithm: jose.HS256, Key: jose.JSONWebKey{Key: shared, KeyID: "rsa"}}, said(), nil),
		"no signature":           encoded(`{"alg":"none","typ":"JWT"}`) + "." + parts[1] + ".",
		"another's signature":    parts[0] + "." + encoded(string(forged)) + "." + parts[2],
		"cut":                    good[:len(good)-10],
		"twice":                  good + " " + good,
	}
	for _, file := range []string{k.jwks(t), pems} {
		g, err := New(Config{Token: Token{Realm: "https://auth.test/token", Service: "mirror.test", Issuer: "auth.test", KeysFile: file}, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		for name, token := range right {
			who, err := g.Caller(bearer(token))
			if err != nil || strings.Join(who.Names, " ") != "ci" || !who.MayPull(is("quay.io/org/app")) || !who.MayPull(is("quay.io/org/all")) {
				t.Errorf("%s: %+v %v", name, who, err)
			}
			for _, other := range []string{"", "quay.io/org/pushed", "quay.io/org/none", "all", "quay.io/org", "quay.io/org/app/sub", "catalog", "*"} {
				if who.MayPull(is(other)) {
					t.Errorf("%s: may pull %s", name, other)
				}
			}
		}
		for name, token := range wrong {
			if who, err := g.Caller(bearer(token)); !errors.Is(err, ErrWrong) || who.Vouched() {
				t.Errorf("%s: %+v %v", name, who, err)
			}
		}
		if who, err := g.Caller(bearer(sign(t, ec, with("sub", nil), nil))); err != nil || who.Known() || !who.Vouched() || !who.MayPull(is("quay.io/org/app")) {
			t.Errorf("without a name: %+v %v", who, err)
		}
		if who, err := g.Caller(shows(here, "ci", secret)); !errors.Is(err, ErrWrong) || who.Vouched() {
			t.Errorf("a password: %+v %v", who, err)
		}
		for want, got := range map[string]string{
			`Bearer realm="https://auth.test/token",service="mirror.test"`:                                                                    g.Challenge("", nil),
			`Bearer realm="https://auth.test/token",service="mirror.test",scope="repository:quay.io/org/app:pull"`:                            g.Challenge("quay.io/org/app", nil),
			`Bearer realm="https://auth.test/token",service="mirror.test",scope="repository:quay.io/org/app:pull",error="invalid_token"`:      g.Challenge("quay.io/org/app", ErrWrong),
			`Bearer realm="https://auth.test/token",service="mirror.test",scope="repository:quay.io/org/app:pull",error="insufficient_scope"`: g.Challenge("quay.io/org/app", errors.New("scope")),
		} {
			if got != want {
				t.Errorf("%s\nwant %s", got, want)
			}
		}
	}
}

func TestKeysThatAreNone(t *testing.T) {
	k := newKeys(t)
	private, err := x509.MarshalPKCS8PrivateKey(k.ec)
	if err != nil {
		t.Fatal(err)
	}
	marshal := func(keys ...jose.JSONWebKey) string {
		raw, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
		if err != nil {
			t.Fatal(err)
		}
		return string(raw)
	}
	var many []crypto.PublicKey
	for range maxKeys + 1 {
		many = append(many, k.ec.Public())
	}
	name := filepath.Join(t.TempDir(), "keys")
	for what, text := range map[string]string{
		"nothing": "", "words": "none\n", "no keys": `{"keys":[]}`, "no JSON": `{"keys":`, "another document": `{}`,
		"a secret":       marshal(jose.JSONWebKey{Key: []byte(secret + strings.Repeat("x", 32)), KeyID: "x"}),
		"a private key":  marshal(jose.JSONWebKey{Key: k.ec, KeyID: "x"}),
		"a private PEM":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
		"a broken PEM":   string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")})),
		"too many keys":  publicPEM(t, many...),
		"a broken point": `{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}`,
	} {
		_, err := New(Config{Token: Token{KeysFile: write(t, name, text)}, Logger: slog.New(slog.DiscardHandler)})
		if err == nil || !strings.HasPrefix(err.Error(), "access.token.keys_file: "+name) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
