# Everything works on a fresh Debian machine with Go, make and git. As root, `make test` installs the
# clients that it pulls with; otherwise tests that need them are skipped and say so.
export CGO_ENABLED ?= 0
LINT := go tool -modfile=.ci/tools.mod golangci-lint

build:
	go build -trimpath -o bin/breakwater ./cmd/breakwater

run: build
	bin/breakwater serve --config ''

test:
	testdata/install.sh
	CGO_ENABLED=1 go test -race -timeout 45m ./... # cmd/breakwater runs real clients, one after the other
	go test -run TestBreakerModel ./proxy/upstream # all of it is too slow with -race

# The chart alone; and in a cluster of one node, which CLUSTER_SH starts (root).
chart:
	testdata/install.sh
	go test ./charts

test-cluster:
	testdata/install.sh
	CI=true go test -tags cluster -count=1 -run TestCluster -timeout 60m -v ./charts

lint:
	$(LINT) run
	go vet ./...

fuzz:
	testdata/fuzz.sh 30s

faults-full:
	testdata/install.sh
	testdata/faults.sh

# What is installed, into dist. vuln needs the database of vulnerabilities: from the network, or where
# VULNDB=file:///FOLDER says.
packages image licences:
	go run ./cmd/pack $@

vuln:
	go tool -modfile=.ci/pack.mod govulncheck $(if $(VULNDB),-db $(VULNDB)) ./... || { [ $$? = 3 ] || echo 'vuln: not checked, for want of the database' >&2; exit 1; }

bench:
	go run ./cmd/bench

demo:
	go run ./cmd/demo

soak:
	go run ./cmd/soak

fleet:
	go run ./cmd/fleet

# The long runs. powercut needs root: it mounts a file system of its own.
powercut:
	FAULTS=full go test -count=1 -timeout 60m -v -run TestF46PowerCut ./storage

.PHONY: build run test chart test-cluster lint fuzz faults-full packages image licences vuln bench demo soak fleet powercut
