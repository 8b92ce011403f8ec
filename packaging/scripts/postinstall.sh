#!/bin/sh
# deb: configure OLD-VERSION, rpm: how many versions there are. It touches no file of any client.
set -e

if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers breakwater.conf
elif ! getent passwd breakwater >/dev/null; then
	useradd --system --user-group --home-dir /var/lib/breakwater --no-create-home --shell /usr/sbin/nologin breakwater
fi

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	systemctl try-restart breakwater.service # if it runs; its port stays open meanwhile
fi

case "$1 $2" in
"configure " | "1 ")
	cat <<-'EOF'
		breakwater: its configuration is /etc/breakwater/breakwater.yaml, and good as it is.
		breakwater: start it: systemctl enable --now breakwater.socket breakwater.service
		breakwater: then tell Docker: {"registry-mirrors": ["http://127.0.0.1:5000"]} in /etc/docker/daemon.json
	EOF
	;;
esac
