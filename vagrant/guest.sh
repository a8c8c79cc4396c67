#!/bin/bash
# What `./run vm` runs as root in a machine that virtme-ng booted: guest.sh ROOT SNAPSHOT KERNEL SLOWNESS PYTEST…
#
# The host's files are there read-only. They come a second time, cached: without that each page of the compiler in bcc
# is asked for again. In the place of ROOT, the checkout, comes a copy of SNAPSHOT, which nobody edits meanwhile; it lies
# in memory, and what is written there too. KERNEL is the unpacked packages. SLOWNESS is by how much the
# tests' bounds are to be multiplied. The rest goes to pytest.
set -euo pipefail

root="$1" snapshot="$2" kernel="$3" slowness="$4"
shift 4

mkdir -p /run/host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose sprint /run/host
modules="$(readlink -f "/lib/modules/$(uname -r)")"
mount --bind /run/host/usr /usr
# As on a machine where this kernel and its headers are installed: bcc finds them by itself.
mount --bind "/run/host$kernel/usr/src" /usr/src
mount -t tmpfs modules /usr/lib/modules
ln -s "/run/host$modules" "/usr/lib/modules/$(uname -r)"
mount -t tmpfs -o mode=755 checkout "$root"
cp -a "/run/host$snapshot/." "$root"
for made in .venv tests/real/node/node_modules; do # by the set-up, on the host
    [[ ! -d "/run/host$root/$made" ]] || { mkdir -p "$root/$made" && mount --bind "/run/host$root/$made" "$root/$made"; }
done

cd -- "$root"
modprobe -q tun || true # whose device node the system makes where it is started as a whole
for device in /sys/class/net/*/device/driver; do
    [[ "$(readlink -f "$device")" != */virtio_net ]] || nic="$(basename "${device%/device/driver}")"
done
[[ -n "${nic:-}" ]] || echo "guest: no virtio NIC" >&2
export SPRINT_TEST_NIC="${nic:-}" SPRINT_TEST_SLOWNESS="$slowness" HOME=/tmp TMPDIR=/tmp
unset BCC_KERNEL_SOURCE
exec 3>&1 # past pytest, which takes the tests' output for itself
"$root/.venv/bin/python" -m vagrant.guest_facts >&3 || echo "guest: the facts could not be gathered" >&2
status=0
"$root/.venv/bin/python" -m pytest -p vagrant.guest_report "$@" || status=$?
# Not through the machine's own status, which would be that of a machine that never came so far.
echo "@@sprint-vm {\"ended\": $status}"
