#!/bin/bash
# Install the system packages that are missing, and nothing else (Debian, Ubuntu).
#
#   tools/setup-system.sh serve    what `make serve` needs: Python and its venv module
#   tools/setup-system.sh test     and the clients, peers and the kernel that tests use
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:?usage: tools/setup-system.sh serve|test}
kernel_dir=var/kernel

fail() {
    echo "setup: $*" >&2
    exit 1
}

# -- what is missing -----------------------------------------------------------

missing=()

# A package is asked for only if the program it brings is not there: a machine with
# its own build of a tool keeps it.
need_command() {
    local command=$1 package=$2
    PATH=$PATH:/usr/sbin:/sbin type -P "$command" >/dev/null || missing+=("$package")
}

need_python() {
    local python version
    if ! python=$(tools/find-python.sh); then
        missing+=(PYTHON)
    elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        missing+=("python$version-venv")
    fi
}

# What PYTHON above stands for: Ubuntu 22.04 has 3.11 beside its python3, which is
# 3.10. Where there are no package lists yet, what all later ones have.
python_packages() {
    local version
    version=$(apt-cache policy python3 | sed -n 's/^ *Candidate: \([0-9.]*\).*/\1/p')
    if dpkg --compare-versions "${version:-3.11}" ge 3.11; then
        echo python3 python3-venv
    else
        echo python3.11 python3.11-venv
    fi
}

need_test_tools() {
    need_command qemu-img qemu-utils
    need_command qemu-io qemu-utils
    need_command qemu-nbd qemu-utils
    need_command qemu-storage-daemon qemu-system-common
    need_command qemu-system-x86_64 qemu-system-x86
    need_command nbdkit nbdkit
    need_command nbdinfo libnbd-bin
    need_command nbdcopy libnbd-bin
    need_command nbdsh python3-libnbd
    need_command nbd-client nbd-client
    need_command nbd-server nbd-server
    need_command systemd-socket-activate systemd
    need_command ss iproute2
    need_command certtool gnutls-bin
    need_command flock util-linux
    need_command fio fio
    need_command mkfs.ext4 e2fsprogs
    need_command e2fsck e2fsprogs
    need_command fstrim util-linux
    need_command file file
    need_command strace strace
    need_command gcc gcc
    [[ -e /usr/include/dlfcn.h ]] || missing+=(libc6-dev)
    need_command cmp diffutils
    # nbdsh and its module belong to the distribution's own Python.
    /usr/bin/python3 -c 'import nbd' 2>/dev/null || missing+=(python3-libnbd)
    # The guest has no libraries for a dynamic busybox.
    dpkg-query -W -f '${Status}' busybox-static 2>/dev/null | grep -q 'ok installed' ||
        missing+=(busybox-static)
}

# -- installing ----------------------------------------------------------------

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

update_lists() {
    [ -n "${lists_updated:-}" ] && return
    echo "setup: apt-get update"
    as_root apt-get -qq update || fail "apt-get update failed (above)"
    lists_updated=1
}

install_missing() {
    local packages
    packages=$(printf '%s\n' "${missing[@]}" | sort -u | tr '\n' ' ')
    packages=${packages% }
    type -P apt-get >/dev/null ||
        fail "no apt-get here; install by hand what Debian calls:" \
            "${packages/PYTHON/python3 (3.11 or later) python3-venv}"
    if [ "$(id -u)" != 0 ] && ! type -P sudo >/dev/null; then
        fail "not root, and no sudo; as root, run:" \
            "apt-get update && apt-get install --no-install-recommends" \
            "${packages/PYTHON/$(python_packages)}"
    fi
    update_lists
    packages=${packages/PYTHON/$(python_packages)}
    for package in $packages; do
        apt-cache show "$package" >/dev/null 2>&1 || case $package in
        python3*) fail "this system has no package $package:" \
            "install Python 3.11 or later with venv, or name one: make PYTHON=/path/to/python3" ;;
        *) fail "this system has no package $package (wanted: $packages)" ;;
        esac
    done
    echo "setup: installing $packages"
    # The run level keeps servers among them from being started.
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -y \
        -o Dpkg::Use-Pty=0 install --no-install-recommends $packages >/dev/null ||
        fail "apt-get install failed (above); wanted: $packages"
}

# -- a kernel for tests/guest --------------------------------------------------

# Unpacked and not installed: a kernel's package scripts write boot loaders.
fetch_kernel() {
    [ -e "$kernel_dir/complete" ] && return
    local id meta package work deb
    id=$(. /etc/os-release && echo "$ID")
    case $id in
    ubuntu) meta=linux-image-generic ;;
    *) meta=linux-image-amd64 ;;
    esac
    if ! apt-cache show "$meta" >/dev/null 2>&1; then
        update_lists
    fi
    # The packages that hold the kernel and its modules, by way of the newest
    # version's dependencies (Ubuntu keeps the modules in a package of their own,
    # and the two depend on each other).
    local packages=() queue=("$meta") seen=" "
    while [ ${#queue[@]} -gt 0 ]; do
        package=${queue[0]}
        queue=("${queue[@]:1}")
        case $seen in *" $package "*) continue ;; esac
        seen+="$package "
        [ "$package" = "$meta" ] || packages+=("$package")
        for next in $(apt-cache depends --no-recommends --no-suggests --important "$package" |
            sed -n 's/^ *|\?Depends: \(linux-\(image\|modules\)-[0-9].*\)$/\1/p'); do
            queue+=("$next")
        done
    done
    [ ${#packages[@]} -gt 0 ] || fail "no kernel package behind $meta"

    echo "setup: fetching ${packages[*]} (unpacked under $kernel_dir, not installed)"
    rm -rf "$kernel_dir"
    work=$kernel_dir/unpack
    mkdir -p "$work"
    (cd "$work" && apt-get -qq download "${packages[@]}" 2>apt.log) || {
        # The lists name a version that the archive has since replaced.
        update_lists
        (cd "$work" && apt-get -qq download "${packages[@]}") ||
            fail "apt-get download ${packages[*]} failed (above)"
    }
    for deb in "$work"/*.deb; do
        # A fifteenth of the whole: only what the guest can use.
        dpkg --fsys-tarfile "$deb" | tar -x -C "$kernel_dir" --wildcards --no-anchored \
            'boot/vmlinuz-*' 'modules.builtin' 'kernel/drivers/block/nbd.ko*' \
            'kernel/drivers/virtio/*' 'kernel/drivers/net/virtio_net.ko*' \
            'kernel/drivers/net/net_failover.ko*' 'kernel/net/core/*' \
            'kernel/fs/ext4/*' 'kernel/fs/jbd2/*' 'kernel/fs/mbcache.ko*' \
            'kernel/crypto/*' 'kernel/lib/*' 2>/dev/null || true
    done
    rm -rf "$work"
    set -- "$kernel_dir"/boot/vmlinuz-*
    [ -e "$1" ] || fail "no kernel in ${packages[*]}"
    touch "$kernel_dir/complete"
}

# ------------------------------------------------------------------------------

case $what in
serve) need_python ;;
test)
    need_python
    need_test_tools
    ;;
*) fail "'$what': expected serve or test" ;;
esac
[ ${#missing[@]} = 0 ] || install_missing
tools/find-python.sh >/dev/null ||
    fail "no Python 3.11 or later on PATH; name one: make PYTHON=/path/to/python3"
[ "$what" = serve ] || fetch_kernel
