"""``nbdqcow-nbd --connect``: a Linux kernel's own device, attached by us."""

import base64
import struct
import subprocess
from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.guest.guest import build_guest, run_guest
from tests.guest.kernel import Kernel
from tests.guest.python import ENVIRONMENT, add_python

MODULES = ["crc32c_generic", "ext4", "nbd"]

PROGRAM = f"""#!/bin/sh
{ENVIRONMENT} exec python3 -c '
import sys
from nbdqcow.cli.nbd import main
sys.argv[0] = "qemu-nbd"
sys.exit(main())
' "$@"
"""

# What ends a boot record: a table of one partition, of type 0x83, from sector 2048
# on and 4096 sectors long, and the signature.
_ENTRY = struct.pack("<4xB3xII", 0x83, 2048, 4096)
PARTITIONS = base64.b64encode(_ENTRY.ljust(64, b"\0") + b"\x55\xaa").decode()

SCRIPT = f"""
mkdir -p /var/lock /var/tmp
attached() {{ [ -e /sys/block/$1/pid ]; }}
refused() {{
    if "$@" 2>/tmp/refusal; then fail "$* was not refused"; fi
    cat /tmp/refusal
}}
gone() {{
    tries=0
    while attached $1; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || fail "$1 stays attached"
        sleep 0.1
    done
}}

refused qemu-nbd -c /dev/nbd99 -f qcow2 /disk.qcow2
qemu-nbd -c /dev/nbd0 -f qcow2 --pid-file=/tmp/pid /disk.qcow2
attached nbd0
echo "SIZE $(($(cat /sys/block/nbd0/size) * 512))"
echo "CACHE $(cat /sys/block/nbd0/queue/write_cache)"
refused qemu-nbd -c /dev/nbd1 -f qcow2 /disk.qcow2
refused qemu-nbd -r -c /dev/nbd0 -k /tmp/other -f raw /script

/sbin/mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null
md5sum /mnt/file >/tmp/sums
umount /mnt
qemu-nbd -d /dev/nbd0
gone nbd0
qemu-nbd -d /dev/nbd0
echo DETACHED

qemu-nbd -s -c /dev/nbd0 -f qcow2 /disk.qcow2
mount -t ext4 /dev/nbd0 /mnt
rm /mnt/file
umount /mnt
qemu-nbd -d /dev/nbd0
gone nbd0

qemu-nbd -v -c /dev/nbd0 -f qcow2 /disk.qcow2 2>/tmp/said &
until grep -q "is now connected" /tmp/said; do sleep 0.1; done
cat /tmp/said
mount -t ext4 /dev/nbd0 /mnt
md5sum -c -s /tmp/sums
umount /mnt
echo SUMS-EQUAL
# What only the kernel's cache has outlives an end by a signal.
echo {PARTITIONS} | base64 -d | dd of=/dev/nbd0 bs=66 oflag=seek_bytes seek=446
kill -TERM $!
wait $!
gone nbd0

qemu-nbd -c /dev/nbd0 -f qcow2 --pid-file=/tmp/pid /disk.qcow2
[ -b /dev/nbd0p1 ] || fail "no partition"
echo "PARTITION $(($(cat /sys/block/nbd0/nbd0p1/size) * 512))"
# A dead server takes its device with it.
kill -KILL $(cat /tmp/pid)
gone nbd0
qemu-nbd -r -c /dev/nbd0 -f qcow2 /disk.qcow2
echo "READ-ONLY $(cat /sys/block/nbd0/ro)"
qemu-nbd -d /dev/nbd0
gone nbd0
"""


@pytest.mark.guest
@pytest.mark.timeout(240)
def test_a_kernels_device(kernel: Kernel, tmp_path: Path) -> None:
    qemu, qemu_img = find_tool("qemu-system-x86_64"), find_tool("qemu-img")
    image = tmp_path / "disk.qcow2"
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, "64M"], check=True)
    guest = build_guest(kernel, SCRIPT, [Path(find_tool("mkfs.ext4"))], MODULES)
    add_python(guest, tmp_path)
    guest.add_file("sbin/qemu-nbd", PROGRAM.encode(), mode=0o755)
    guest.add_file("disk.qcow2", image.read_bytes())
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(guest.pack())

    lines = run_guest(qemu, kernel, initramfs, timeout=200)
    print("\n".join(lines))

    for line in (
        "qemu-nbd: Failed to open /dev/nbd99: No such file or directory"
        " (is the kernel's module loaded? modprobe nbd)",
        f"SIZE {64 << 20}",
        "CACHE write back",
        "qemu-nbd: Failed to set NBD socket of /dev/nbd0: Device or resource busy",
        "DETACHED",
        "NBD device /dev/nbd0 is now connected to /disk.qcow2",
        "SUMS-EQUAL",
        f"PARTITION {4096 * 512}",
        "READ-ONLY 1",
    ):
        assert line in lines
    assert any("/disk.qcow2" in line and "lock" in line for line in lines)
    assert lines.count("/dev/nbd0 disconnected") == 4
