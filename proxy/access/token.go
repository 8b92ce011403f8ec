package access

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Token is a token server as the distribution specification has it ("Token Authentication").
type Token struct {
	Realm    string // URL at which clients get tokens
	Service  string // audience of the tokens
	Issuer   string
	KeysFile string // a JWKS, or PEM certificates and public keys
}

// maxKeys bounds how many keys a token is tried with.
const maxKeys = 32

// signatures are those that a public key can make sure of. A token never chooses a key that it brings along
// (CVE-2025-24976), nor one that is a shared secret.
var signatures = []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512,
	jose.ES256, jose.ES384, jose.ES512, jose.EdDSA}

type tokens struct {
	Token
	file *file[[]jose.JSONWebKey]
}

// claims is what a good token says (distribution-spec, "Token Claim Set").
type claims struct {
	jwt.Claims
	Access []struct {
		Type    string   `json:"type"`
		Name    string   `json:"name"`
		Actions []string `json:"actions"`
	} `json:"access"`
}

// mayPull takes "*" for every action, as registries do (distribution, registry/auth/token).
func (c *claims) mayPull(means func(name string) bool) bool {
	for _, a := range c.Access {
		if a.Type == "repository" && (slices.Contains(a.Actions, "pull") || slices.Contains(a.Actions, "*")) && means(a.Name) {
			return true
		}
	}
	return false
}

func newTokens(cfg Token, logger *slog.Logger) (*tokens, error) {
	file, err := open(logger, func() (*[]jose.JSONWebKey, error) { return readKeys(cfg.KeysFile) }, cfg.KeysFile)
	return &tokens{cfg, file}, err
}

// readKeys reads a JWKS, or PEM.
func readKeys(name string) (*[]jose.JSONWebKey, error) {
	raw, err := readFile(name)
	if err != nil {
		return nil, err
	}
	var set jose.JSONWebKeySet
	if bytes.HasPrefix(bytes.TrimSpace(raw), []byte("{")) {
		err = json.Unmarshal(raw, &set)
	} else {
		set.Keys, err = pemKeys(raw)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: neither a JWKS nor PEM: %w", name, err)
	}
	for i, key := range set.Keys {
		switch key.Key.(type) {
		case *rsa.PublicKey, *ecdsa.PublicKey, ed25519.PublicKey:
		default: // among them secrets, and private keys, which do not belong here
			return nil, fmt.Errorf("%s: key %d is not the public key of an RSA, EC or Ed25519 pair; write that", name, i+1)
		}
	}
	if n := len(set.Keys); n == 0 || n > maxKeys {
		return nil, fmt.Errorf("%s: %d public keys; write 1 to %d", name, n, maxKeys)
	}
	return &set.Keys, nil
}

func pemKeys(raw []byte) ([]jose.JSONWebKey, error) {
	var keys []jose.JSONWebKey
	for block, rest := pem.Decode(raw); block != nil; block, rest = pem.Decode(rest) {
		var key any
		var err error
		switch block.Type {
		case "CERTIFICATE":
			var cert *x509.Certificate
			if cert, err = x509.ParseCertificate(block.Bytes); err == nil {
				key = cert.PublicKey
			}
		case "PUBLIC KEY":
			key, err = x509.ParsePKIXPublicKey(block.Bytes)
		case "RSA PUBLIC KEY":
			key, err = x509.ParsePKCS1PublicKey(block.Bytes)
		default:
			err = fmt.Errorf("a %.30q, where certificates and public keys belong", block.Type)
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, jose.JSONWebKey{Key: key})
	}
	return keys, nil
}

// check returns what a bearer's token says, if it is signed by the issuer, meant for us, and good now, give or
// take a minute.
func (t *tokens) check(authorization string) (*claims, error) {
	scheme, raw, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return nil, ErrWrong
	}
	token, err := jwt.ParseSigned(strings.TrimSpace(raw), signatures)
	if err != nil || len(token.Headers) != 1 {
		return nil, ErrWrong
	}
	c, err := t.verify(token)
	if err != nil || c.Expiry == nil || c.Validate(jwt.Expected{Issuer: t.Issuer, AnyAudience: jwt.Audience{t.Service}}) != nil {
		return nil, ErrWrong
	}
	return c, nil
}

// verify tries the keys: the one that the token names, if we have it under that name, else all.
func (t *tokens) verify(token *jwt.JSONWebToken) (*claims, error) {
	keys := *t.file.get()
	named := slices.DeleteFunc(slices.Clone(keys), func(key jose.JSONWebKey) bool { return key.KeyID == "" || key.KeyID != token.Headers[0].KeyID })
	if len(named) > 0 {
		keys = named
	}
	for _, key := range keys {
		if key.Algorithm != "" && key.Algorithm != token.Headers[0].Algorithm {
			continue
		}
		c := new(claims)
		if err := token.Claims(key.Key, c); err == nil {
			return c, nil
		}
	}
	return nil, errors.New("signed by nobody we know")
}

// challenge sends a client to the token server (RFC 6750, section 3).
func (t *tokens) challenge(name string, wrong error) string {
	said := fmt.Sprintf(`Bearer realm="%s",service="%s"`, t.Realm, t.Service)
	if name != "" {
		said += fmt.Sprintf(`,scope="repository:%s:pull"`, name)
	}
	switch {
	case errors.Is(wrong, ErrWrong):
		said += `,error="invalid_token"`
	case wrong != nil:
		said += `,error="insufficient_scope"`
	}
	return said
}
