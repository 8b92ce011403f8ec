#!/bin/sh
# deb: remove, upgrade or purge, rpm: how many versions are left. Only a purge takes what was pulled, and
# rpm knows none: rm -r /var/lib/breakwater.
set -e

case "$1" in
purge)
	# Whatever it cannot delete is told, and left: a failure would leave the package half removed for good. A disk
	# that is mounted there stays, empty.
	if [ -d /var/lib/breakwater ]; then
		find /var/lib/breakwater/ -mindepth 1 -xdev -delete || true
		rmdir /var/lib/breakwater 2>/dev/null || true
	fi
	# What else is there somebody has put there: keys and passwords.
	rmdir --ignore-fail-on-non-empty /etc/breakwater 2>/dev/null || true
	;;
esac

if [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
