#!/bin/sh
# Installs what the tests need and this machine lacks: Debian's packages (when root), and, built from
# their modules into a cache folder outside the checkout, the clients that Debian has not or has only
# old. It prints nothing if nothing is missing. What cannot be installed is no failure here: the tests
# that need it say so, and skip, or fail in CI.
set -u

packages='gcc libc6-dev docker.io containerd runc podman skopeo iptables iproute2 strace e2fsprogs nginx mmdebstrap systemd systemd-container rpm'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/breakwater-test
bin=$cache/bin
clients=$(dirname "$0")/containerd-client

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
CGO_ENABLED=0 GOFLAGS='' go build -C "$clients" -o "$bin/containerd-client" .

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
