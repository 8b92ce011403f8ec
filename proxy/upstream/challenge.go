package upstream

import "strings"

// maxChallenges bounds what is read of a hostile header.
const maxChallenges = 16

// parseChallenges reads WWW-Authenticate, which holds any number of challenges on any number of
// lines (RFC 9110, 11.6.1). Names are lower-cased; the scheme stands under "". What cannot be read
// ends the line.
func parseChallenges(lines []string) []map[string]string {
	var all []map[string]string
	for _, line := range lines {
		var current map[string]string
		for line = trim(line); line != "" && len(all) <= maxChallenges; line = trim(line) {
			word, rest := cutToken(line)
			if word == "" {
				break
			}
			if after := trimSpace(rest); current != nil && strings.HasPrefix(after, "=") {
				value, rest, ok := cutValue(trimSpace(after[1:]))
				if !ok {
					break
				}
				current[strings.ToLower(word)] = value
				line = rest
				continue
			}
			current = map[string]string{"": strings.ToLower(word)}
			all = append(all, current)
			line = rest
		}
	}
	return all
}

func trim(s string) string      { return strings.TrimLeft(s, " \t,") }
func trimSpace(s string) string { return strings.TrimLeft(s, " \t") }

// cutToken splits a token (RFC 9110, 5.6.2) off the front of s.
func cutToken(s string) (token, rest string) {
	i := strings.IndexFunc(s, func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

// cutValue splits a token or quoted string off the front of s; false if it is neither.
func cutValue(s string) (value, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		value, rest = cutToken(s)
		return value, rest, value != ""
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), s[i+1:], true
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return "", "", false
}
