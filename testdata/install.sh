#!/bin/sh
# Installs what the tests need and this machine lacks: Debian's packages (when root), and, built from
# their modules into a cache folder outside the checkout, the clients that Debian has not or has only
# old. It prints nothing if nothing is missing. What cannot be installed is no failure here: the tests
# that need it say so, and skip, or fail in CI.
set -u

packages='gcc libc6-dev docker.io containerd runc podman skopeo iptables iproute2 strace e2fsprogs nginx mmdebstrap systemd systemd-container rpm'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/breakwater-test
bin=$cache/bin
here=$(dirname "$0")

install_packages() {
	# A package must not start its service: the tests run daemons of their own, and this machine
	# may be somebody's desk.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		trap 'rm -f "$policy"' EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
	fi
	export DEBIAN_FRONTEND=noninteractive
	said=$(apt-get -qq update 2>&1 && apt-get -qq install --yes --no-install-recommends "$@" 2>&1) || echo "$said" >&2
}

missing=
if command -v dpkg-query >/dev/null; then
	for package in $packages; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
	done
fi
if [ -n "$missing" ] && [ "$(id -u)" = 0 ]; then
	echo "installing:$missing"
	# shellcheck disable=SC2086 # a list of words
	install_packages $missing
elif [ -n "$missing" ]; then
	echo "not root, so not installing:$missing"
fi

# build VERSION PACKAGE…: the packages' programs, unless the cache has them in that version.
build() {
	version=$1
	shift
	for package in "$@"; do
		if ! go version -m "$bin/${package##*/}" 2>/dev/null | grep -q "^	mod	.*	$version	"; then
			echo "building: ${package##*/} $version"
			CGO_ENABLED=0 GOFLAGS='' GOBIN=$bin go install "$package@$version"
		fi
	done
}
containerd=github.com/containerd/containerd/v2/cmd
build v0.22.1 github.com/google/go-containerregistry/cmd/crane
build v2.4.2 $containerd/containerd $containerd/ctr $containerd/containerd-shim-runc-v2
build v0.0.0-20260831232431-97274622c111 github.com/opencontainers/distribution-spec/conformance
build v1.8.0 github.com/versity/versitygw/cmd/versitygw
CGO_ENABLED=0 GOFLAGS='' go build -C "$here/containerd-client" -o "$bin/containerd-client" .

# What the chart is tested with. Both Helms call themselves helm; helm-unittest needs a replaced module.
(bin=$cache/helm3 && build v3.22.0 helm.sh/helm/v3/cmd/helm)
(bin=$cache/helm4 && build v4.3.1 helm.sh/helm/v4/cmd/helm)
build v0.8.0 github.com/yannh/kubeconform/cmd/kubeconform
build v1.14.2 github.com/norwoodj/helm-docs/cmd/helm-docs
CGO_ENABLED=0 GOFLAGS='' go build -C "$here/helm-unittest" -o "$bin/helm-unittest" github.com/helm-unittest/helm-unittest/cmd/helm-unittest

# document MODULE VERSION FILE: a file of a module, among the documents of Kubernetes' APIs.
document() {
	if [ "$(cat "$cache/kubernetes/${3##*/}.version" 2>/dev/null)" != "$2" ]; then
		echo "fetching: ${3##*/} $2"
		mkdir -p "$cache/kubernetes"
		module=$(GOFLAGS='' go mod download -json "$1@$2" | sed -n 's/.*"Dir": "\(.*\)",*/\1/p')
		cp "$module/$3" "$cache/kubernetes/" && echo "$2" >"$cache/kubernetes/${3##*/}.version"
	fi
}
document k8s.io/kubernetes v1.35.4 api/openapi-spec/swagger.json
for kind in podmonitors servicemonitors; do
	document github.com/prometheus-operator/prometheus-operator v0.85.0 example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml
done

# A small Debian that packages are installed into, and that boots.
debian=$cache/debian
include=systemd,systemd-sysv,ca-certificates,cloud-init
if [ "$(id -u)" = 0 ] && [ "$(cat "$debian/etc/breakwater-test" 2>/dev/null)" != "$include" ] && command -v mmdebstrap >/dev/null; then
	echo "installing a Debian for tests: $include"
	rm -rf "$debian"
	# shellcheck disable=SC1091 # the system's
	if said=$(mmdebstrap --variant=minbase --include="$include" "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$debian" 2>&1); then
		echo "$include" >"$debian/etc/breakwater-test"
	else
		echo "$said" >&2
	fi
fi
