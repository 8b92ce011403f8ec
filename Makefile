# Everything works on a fresh Debian machine with Go, make and git. As root, `make test` installs the
# clients that it pulls with; otherwise tests that need them are skipped and say so.
export CGO_ENABLED ?= 0
LINT := go tool -modfile=.ci/tools.mod golangci-lint

build:
	go build -trimpath -o bin/breakwater ./cmd/breakwater

run: build
	bin/breakwater serve

test:
	testdata/install.sh
	CGO_ENABLED=1 go test -race ./...
	go test -run TestBreakerModel ./proxy/upstream # all of it is too slow with -race

lint:
	$(LINT) run
	go vet ./...

fuzz:
	testdata/fuzz.sh 30s

faults-full:
	testdata/install.sh
	testdata/faults.sh

bench:
	go run ./cmd/bench

demo:
	go run ./cmd/demo

soak:
	go run ./cmd/soak

# The long runs. powercut needs root: it mounts a file system of its own.
powercut:
	FAULTS=full go test -count=1 -timeout 60m -v -run TestF46PowerCut ./storage

.PHONY: build run test lint fuzz faults-full bench demo soak powercut
