#!/usr/bin/env bash
# Installs the Debian packages that the tests want, if it may; says nothing when all of them are there.
# A test whose program is missing skips and says so, except in CI.
set -euo pipefail

# program or file : package
wants=(
	qemu-img:qemu-utils qemu-io:qemu-utils qemu-nbd:qemu-utils
	qemu-system-x86_64:qemu-system-x86
	nbdinfo:libnbd-bin nbdcopy:libnbd-bin certtool:gnutls-bin
	nbdkit:nbdkit fio:fio strace:strace
	busybox:busybox-static mke2fs:e2fsprogs e2fsck:e2fsprogs debugfs:e2fsprogs
	gcc:gcc xz:xz-utils
)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for want in "${wants[@]}"; do
	command -v "${want%%:*}" >/dev/null || missing+=("${want#*:}")
done
# A guest needs a kernel, whatever its version.
compgen -G '/boot/vmlinuz-*' >/dev/null || missing+=(linux-image-cloud-amd64)
[ ${#missing[@]} -gt 0 ] || exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if ! command -v apt-get >/dev/null; then
	echo "prepare: not a Debian system; the tests would like: ${missing[*]}" >&2
	exit 0
fi
sudo=()
if [ "$(id -u)" != 0 ]; then
	if ! sudo -n true 2>/dev/null; then
		echo "prepare: not root; for all of the tests run: sudo apt-get install ${missing[*]}" >&2
		exit 0
	fi
	sudo=(sudo -n)
fi
echo "prepare: installing ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
if ! { "${sudo[@]}" apt-get -qq update && "${sudo[@]}" apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >&2; then
	echo "prepare: not everything could be installed; tests that need it will skip" >&2
fi
