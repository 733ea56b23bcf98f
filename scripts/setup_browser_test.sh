#!/usr/bin/env bash
# What tests/track/test_report_browser.py needs: Debian's chromium, so as root. Where that is not possible it says why
# in one line and succeeds: the tests then skip with the same reason. With --plan it prints the packages that it would
# install, and installs nothing.
set -euo pipefail
plan=${1:-}

for command in chromium chromium-browser google-chrome; do
    if command -v "$command" >/dev/null; then exit 0; fi
done

skip() {
    [ -z "$plan" ] || exit 0
    echo "setup-browser-test: the report will not be looked at in a browser: chromium is missing, and $*" >&2
    exit 0
}
[ "$(id -u)" = 0 ] || skip "only root can install Debian packages"
command -v apt-get >/dev/null || skip "this system has no apt-get"
packages=(chromium fonts-dejavu-core)
if [ -n "$plan" ]; then
    echo "${packages[*]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
echo "setup-browser-test: Debian's chromium, for the tests of the report"
apt-get update -qq >/dev/null 2>&1 || skip "apt-get update failed"
apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1 || skip "apt-get install failed"
