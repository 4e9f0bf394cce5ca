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
packages=(qemu-utils libnbd-bin python3-libnbd)
. "$(dirname "$0")/private-apt.sh"

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
type -P dpkg-deb >/dev/null || fail "dpkg-deb is needed"

dir=$(cd "$dir" && pwd)
rm -rf "$dir/apt" "$dir/root"
mkdir -p "$dir/root"
private_apt "$dir/apt" deb trixie
"${apt[@]}" --download-only -y install "${packages[@]}" ||
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
