//go:build race

package upstream

// modelLength is less where everything is ten times as slow: what the race detector is to see is in
// short sequences too.
const modelLength = 6
