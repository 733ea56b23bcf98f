#!/usr/bin/env bash
# What tests/cluster needs: Slurm with accounting, ssh, a compiler for the pyxis stand-in. Debian packages, so as root.
# Where that is not possible it says why in one line and succeeds: the tests then skip with the same reason.
# With --plan it prints the packages that it would install, and installs nothing.
set -euo pipefail
plan=${1:-}

missing=()
for command in slurmctld slurmd slurmdbd munged mariadbd sshd rsync gcc shellcheck; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$command" >/dev/null || missing+=("$command")
done
[ -f /usr/include/slurm/spank.h ] || missing+=(spank.h)
[ ${#missing[@]} -gt 0 ] || exit 0

skip() {
    [ -z "$plan" ] || exit 0
    echo "setup-slurm-test: tests/cluster will be skipped: ${missing[*]} missing, and $*" >&2
    exit 0
}
[ "$(id -u)" = 0 ] || skip "only root can install Debian packages"
command -v apt-get >/dev/null || skip "this system has no apt-get"
packages=(slurm-wlm slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge slurmdbd mariadb-server-core
    mariadb-client-core libslurm-dev rsync openssh-server openssh-client gcc libc6-dev shellcheck)
if [ -n "$plan" ]; then
    echo "${packages[*]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
echo "setup-slurm-test: Debian's Slurm, for tests/cluster"
apt-get update -qq >/dev/null 2>&1 || skip "apt-get update failed"
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || skip "apt-get install failed"
