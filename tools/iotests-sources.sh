#!/bin/bash
# Unpack QEMU's block tests under a directory: nothing is installed, no root needed.
#
#   tools/iotests-sources.sh DIR     DIR/tests/qemu-iotests and DIR/python
#
# They are those of the QEMU that the image tool follows: Debian 12's, 7.2.
set -euo pipefail

dir=${1:?usage: tools/iotests-sources.sh DIR}
. "$(dirname "$0")/private-apt.sh"

fail() {
    echo "iotests-sources: $*" >&2
    exit 1
}

[ -e "$dir/complete" ] && exit 0
type -P xz >/dev/null || fail "xz is needed"

rm -rf "$dir"
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
private_apt "$dir/apt" deb-src bookworm
(cd "$dir/apt" && "${apt[@]}" --download-only --tar-only source qemu) ||
    fail "could not download QEMU's sources"
tar -xJf "$dir"/apt/qemu_*.orig.tar.xz -C "$dir" --strip-components=1 \
    --wildcards '*/tests/qemu-iotests' '*/python'
rm -rf "$dir/apt"
touch "$dir/complete"
