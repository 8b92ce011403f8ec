//go:build !race

package upstream

// modelLength is how many events the sequences of TestBreakerModel have.
const modelLength = 8
