#!/usr/bin/env bash
# Serves a disk on a Unix socket and prints how to use it. Called by `make serve`.
set -euo pipefail
cd "$(dirname "$0")/.."

disk=${DISK:-disk.qcow2} size=${SIZE:-10G} socket=${SOCKET:-$PWD/platter.sock}

bin/platter serve --create "$size" --socket "$socket" "$disk" | {
	read -r uri || exit 1
	cat <<EOF
$uri

The disk is $disk. Ctrl-C ends the server. To use it, paste into another terminal:

  nbdinfo --map '$uri'                      what is allocated
  nbdcopy '$uri' copy.img                   the disk into a file
  nbdcopy some.img '$uri'                   a file onto the disk
  qemu-system-x86_64 -m 1G -accel kvm -drive file='$uri',format=raw,if=virtio,cache=none,discard=unmap
  sudo nbd-client -unix '$socket' /dev/nbd0 a block device of this machine (sudo modprobe nbd; nbd-client -d /dev/nbd0)

EOF
	cat
}
