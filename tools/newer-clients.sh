#!/bin/bash
# Unpack Debian 13's NBD clients under a directory: nothing is installed, no root needed.
#
#   tools/newer-clients.sh DIR     DIR/root/usr/bin/{nbdinfo,nbdcopy,qemu-img,...}
#
# Debian 12 has no client that speaks extended headers; these (QEMU 10, libnbd 1.22)
# do. They run on their own C library:
#
#   DIR/run PROGRAM [ARGUMENT]...
set -euo pipefail

dir=${1:?usage: tools/newer-clients.sh DIR}
suite=trixie
packages=(qemu-utils libnbd-bin python3-libnbd)
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "newer-clients: $*" >&2
    exit 1
}

[ -e "$dir/complete" ] && exit 0
# Several tests may ask for them at once.
mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9
[ -e "$dir/complete" ] && exit 0
type -P apt-get dpkg-deb >/dev/null || fail "apt-get and dpkg-deb are needed"
[ -e "$keyring" ] || fail "no $keyring (package debian-archive-keyring)"

mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
rm -rf "$dir/apt" "$dir/root"
mkdir -p "$dir/root" "$dir"/apt/{lists/partial,archives/partial}
: >"$dir/apt/status"
echo "deb [signed-by=$keyring] http://deb.debian.org/debian $suite main" \
    >"$dir/apt/sources.list"
# An apt of its own, to which no package is installed.
options=(
    -qq
    -o Dir::State="$dir/apt"
    -o Dir::State::status="$dir/apt/status"
    -o Dir::Cache="$dir/apt"
    -o Dir::Etc::SourceList="$dir/apt/sources.list"
    -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null
    -o Dir::Etc::PreferencesParts=/dev/null
    -o APT::Install-Recommends=false
    -o Acquire::Languages=none
    -o APT::Sandbox::User="$(id -un)"
)
apt-get "${options[@]}" update || fail "no package lists of $suite"
apt-get "${options[@]}" --download-only -y install "${packages[@]}" ||
    fail "could not download ${packages[*]}"
for package in "$dir"/apt/archives/*.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x -C "$dir/root" --no-same-owner \
        --exclude=./usr/share/doc --exclude=./usr/share/man --exclude=./usr/share/locale
done
rm -rf "$dir/apt"

cat >"$dir/run" <<'RUN'
#!/bin/bash
# Run a program of the root beside this file, with its libraries.
root=$(dirname "$(readlink -f "$0")")/root
program=$1
shift
libraries=$root/usr/lib/x86_64-linux-gnu
for loader in "$root"/usr/lib*/ld-linux-*.so.? "$root"/usr/lib/*/ld-linux-*.so.?; do
    [ -e "$loader" ] && break
done
libraries=$(dirname "$(find "$root/usr/lib" -name libnbd.so.0 -print -quit)")
[ "$program" != python3 ] || export PYTHONHOME=$root/usr
exec "$loader" --library-path "$libraries" "$root/usr/bin/$program" "$@"
RUN
chmod +x "$dir/run"
"$dir/run" nbdinfo --version >/dev/null || fail "nbdinfo does not run"
"$dir/run" qemu-img --version >/dev/null || fail "qemu-img does not run"
touch "$dir/complete"
