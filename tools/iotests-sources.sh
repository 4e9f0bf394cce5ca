#!/bin/bash
# Unpack QEMU's block tests under a directory: nothing is installed, no root needed.
#
#   tools/iotests-sources.sh DIR     DIR/tests/qemu-iotests and DIR/python
#
# They are those of the QEMU that the image tool follows: Debian 12's, 7.2.
set -euo pipefail

dir=${1:?usage: tools/iotests-sources.sh DIR}
suite=bookworm
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "iotests-sources: $*" >&2
    exit 1
}

[ -e "$dir/complete" ] && exit 0
type -P apt-get xz >/dev/null || fail "apt-get and xz are needed"
[ -e "$keyring" ] || fail "no $keyring (package debian-archive-keyring)"

rm -rf "$dir"
mkdir -p "$dir"/apt/lists/partial
dir=$(cd "$dir" && pwd)
: >"$dir/apt/status"
echo "deb-src [signed-by=$keyring] http://deb.debian.org/debian $suite main" \
    >"$dir/apt/sources.list"
options=(
    -qq
    -o Dir::State="$dir/apt"
    -o Dir::State::status="$dir/apt/status"
    -o Dir::Cache="$dir/apt"
    -o Dir::Etc::SourceList="$dir/apt/sources.list"
    -o Dir::Etc::SourceParts=/dev/null
    -o APT::Sandbox::User="$(id -un)"
)
apt-get "${options[@]}" update || fail "no package lists of $suite"
(cd "$dir/apt" && apt-get "${options[@]}" --download-only --tar-only source qemu) ||
    fail "could not download QEMU's sources"
tar -xJf "$dir"/apt/qemu_*.orig.tar.xz -C "$dir" --strip-components=1 \
    --wildcards '*/tests/qemu-iotests' '*/python'
rm -rf "$dir/apt"
touch "$dir/complete"
