#!/usr/bin/env bash
# Make build/rootfs-cpu: the file system of the CPU image, built from docker/Dockerfile, for tests/cluster to run a job in.
# Does nothing when it is up to date. No Docker and no daemon: buildah in a chroot, on a Debian 12 made by mmdebstrap.
#
#   scripts/build_rootfs.sh             build it
#   scripts/build_rootfs.sh --is-fresh  build nothing; exit 1 if there is none, or one of other files than these
#
#   BASE=IMAGE                 a base that buildah can pull, instead of mmdebstrap's
#   PYTHON=/path/to/python3    whose pip's settings (indexes, certificate) the pip of the build gets (default: python3)
#   BUILD_ARGS='…'             more arguments for `buildah bud`
set -euo pipefail
cd "$(dirname "$0")/.."

ROOTFS=build/rootfs-cpu
STAMP=$ROOTFS.stamp
PYTHON=${PYTHON:-python3}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Of all files that go into the image; README.md is left out, as it is only the package's description.
fingerprint() {
    find docker/Dockerfile docker/*.sh requirements/cpu*.txt pyproject.toml prune_opd recipes scripts/build_rootfs.sh \
        -type f ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum
}

if [ -d "$ROOTFS" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$(fingerprint)" ]; then
    exit 0
fi
[ "${1:-}" != --is-fresh ] || exit 1

[ "$(id -u)" = 0 ] || fail "only root can build a root file system here: run it with sudo"
programs=(buildah)
[ -n "${BASE:-}" ] || programs+=(mmdebstrap)
for program in "${programs[@]}"; do
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install --no-install-recommends $program"
done

wanted=$(fingerprint)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A storage of its own, so that nobody's images are touched and nothing stays behind.
buildah() {
    command buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"
}

# pip looks in the build where it looks here. Files it needs are copied, local folders mounted; none of it stays.
pip_settings() {
    local name value word place
    mkdir "$work/pip"
    echo "[global]" >"$work/pip/pip.conf"
    "$PYTHON" -m pip config list | sort | sed -nE "s/^(:env:|global)\.([a-z-]+)='(.*)'$/\2 \3/p" | awk '!seen[$1]++' |
        while read -r name value; do
            case $name in
                cert | constraint)
                    cp "$value" "$work/pip/$name"
                    echo "$name = /run/pip/$name" ;;
                index-url | extra-index-url | find-links)
                    for word in ${value//\\n/ }; do
                        place=${word#file://}
                        [ -d "$place" ] || continue
                        echo "${place%/simple}" >>"$work/pip/mounts" # an index's files lie beside its pages
                    done
                    echo "$name = ${value//\\n/ }" ;;
                default-timeout | timeout | retries | trusted-host | proxy | no-index) echo "$name = $value" ;;
            esac
        done >>"$work/pip/pip.conf"
}

base() {
    [ -z "${BASE:-}" ] || { echo "$BASE" && return; }
    mmdebstrap --quiet --variant=minbase bookworm "$work/base.tar" >&2
    local container
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$work/base.tar" / >/dev/null
    rm "$work/base.tar"
    buildah commit --quiet --rm "$container" localhost/base:12 >/dev/null
    echo localhost/base:12
}

pip_settings
mounts=(--volume "$work/pip:/run/pip:ro" --volume "$work/pip/pip.conf:/etc/pip.conf:ro")
while read -r place; do
    mounts+=(--volume "$place:$place:ro")
done < <(sort -u "$work/pip/mounts" 2>/dev/null)

echo "rootfs: the base" >&2
from=$(base)
echo "rootfs: docker/Dockerfile with ACCEL=cpu" >&2
new=$work/rootfs
# shellcheck disable=SC2086  # BUILD_ARGS is several arguments
buildah bud --quiet --isolation chroot --file docker/Dockerfile --build-arg ACCEL=cpu \
    --build-arg BASE="$from" --output type=local,dest="$new" "${mounts[@]}" ${BUILD_ARGS:-} . >"$work/log" 2>&1 ||
    { tail -n 30 "$work/log" >&2 && fail "buildah could not build docker/Dockerfile: see its last lines above"; }
find "$new/etc/pip.conf" "$new/run/pip" -empty -delete 2>/dev/null || true # where the mounts were
chmod 755 "$new" # a task without root's rights must be able to enter
rm -rf "$ROOTFS" "$STAMP"
mkdir -p build
mv "$new" "$ROOTFS"
echo "$wanted" >"$STAMP" # of the files as they were at the start: one that changed since makes it out of date
echo "rootfs: $ROOTFS, $(du -sh "$ROOTFS" | cut -f 1)" >&2
