package registrytest

import (
	"encoding/base64"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

func TestLeak(t *testing.T) {
	for _, user := range []string{"", "a", "ab", "abc", "robot", "a user"} {
		secret := user + ":pw-" + Canary + "-1"
		req := &http.Request{Header: http.Header{}}
		req.SetBasicAuth(user, "pw-"+Canary)
		for _, text := range []string{
			secret, url.QueryEscape(secret), req.Header.Get("Authorization"), base64.URLEncoding.EncodeToString([]byte(secret)), `level=DEBUG msg="` + secret + `"`,
		} {
			if Leak(text) == "" {
				t.Errorf("%s is not seen", text)
			}
			if leak := Leak(strings.Repeat("x", 1000) + text); len(leak) > 500 || leak == "" {
				t.Errorf("%s is shown as %s", text, leak)
			}
		}
	}
	for _, text := range []string{"", "can ary", "Canary", "quay.test/org/app", base64.StdEncoding.EncodeToString([]byte("robot:can-ary"))} {
		if leak := Leak(text); leak != "" {
			t.Errorf("%s passes for a secret", leak)
		}
	}
}
