#!/bin/bash
# What Vagrant runs as root in a machine: provision.sh CHECKOUT set-up|root-tests.
#
# The set-up is ./run's own, reached by a command that collects the root tests and runs none. Where ./run would go on
# without a package, this stops: tests that were skipped must not look like tests that passed.
set -euo pipefail

die() {
    printf 'provision: %s\n' "$*" >&2
    exit 1
}

[[ $# == 2 ]] || die "usage: provision.sh CHECKOUT set-up|root-tests"
cd -- "$1"
[[ -x ./run ]] || die "no checkout of Bitcoin Sprint: $PWD"

case "$2" in
set-up)
    ./run test --collect-only -q tests/net </dev/null
    [[ ! -e .cache/apt-refused ]] || die "not installable, so tests would be skipped:$(<.cache/apt-refused)"
    ;;
root-tests)
    [[ "$(id -u)" == 0 ]] || die "needs root: without it the root tests would all be skipped"
    echo "provision: the root tests on $(sed -n 's/^PRETTY_NAME=//p' /etc/os-release), kernel $(uname -r)"
    exec ./run test tests/net </dev/null
    ;;
*)
    die "unknown step: $2; expected set-up or root-tests"
    ;;
esac
