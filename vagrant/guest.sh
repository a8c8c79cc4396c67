#!/bin/bash
# What `./run vm` runs as root in a machine that virtme-ng booted: guest.sh ROOT SNAPSHOT KERNEL FACTS REPORT PYTEST…
#
# The host's files are there read-only. They come a second time, cached: without that each page of the compiler in bcc
# is asked for again. ROOT is the checkout, over which SNAPSHOT of it is laid, so that nobody edits it meanwhile; what
# is written there stays in memory. KERNEL is the unpacked packages. FACTS and REPORT are yes or no.
set -euo pipefail

root="$1" snapshot="$2" kernel="$3"
shift 3

mkdir -p /run/host /run/checkout/{upper,work}
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose sprint /run/host
modules="$(readlink -f "/lib/modules/$(uname -r)")"
mount --bind /run/host/usr /usr
# As on a machine where this kernel and its headers are installed: bcc finds them by itself.
mount --bind "/run/host$kernel/usr/src" /usr/src
mount -t tmpfs modules /usr/lib/modules
ln -s "$modules" "/usr/lib/modules/$(uname -r)"
layers="lowerdir=/run/host$snapshot:/run/host$root,upperdir=/run/checkout/upper,workdir=/run/checkout/work"
mount -t overlay -o "$layers" checkout "$root"

cd -- "$root"
for device in /sys/class/net/*/device/driver; do
    [[ "$(readlink -f "$device")" != */virtio_net ]] || nic="$(basename "${device%/device/driver}")"
done
[[ -n "${nic:-}" ]] || echo "guest: no virtio NIC" >&2
export SPRINT_TEST_NIC="${nic:-}" HOME=/tmp TMPDIR=/tmp
unset BCC_KERNEL_SOURCE
exec 3>&1 # past pytest, which takes the tests' output for itself
"$root/.venv/bin/python" -m vagrant.guest_facts >&3 || echo "guest: the facts could not be gathered" >&2
status=0
"$root/.venv/bin/python" -m pytest -p vagrant.guest_report "$@" || status=$?
# Not through the machine's own status, which would be that of a machine that never came so far.
echo "@@sprint-vm {\"ended\": $status}"
