"""A real Linux kernel attaches our export, and makes a file system on it."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ServedProcess, find_free_port, find_tool
from tests.guest.guest import build_guest, run_guest
from tests.guest.kernel import Kernel

# crc32c is what ext4 asks the crypto layer for by name.
MODULES = ["virtio_pci", "virtio_net", "crc32c_generic", "ext4", "nbd"]

SCRIPT = """
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up

attach() {{
    /sbin/nbd-client 10.0.2.2 {port} /dev/nbd0 -N "{export}" -C 4 -b 512
    tries=0
    until [ "$(cat /sys/block/nbd0/size)" -gt 0 ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || fail "nbd0 has no size"
        sleep 0.1
    done
}}
detach() {{
    /sbin/nbd-client -d /dev/nbd0
    tries=0
    while [ -e /sys/block/nbd0/pid ]; do
        tries=$((tries + 1))
        [ $tries -lt 100 ] || fail "nbd0 stays attached"
        sleep 0.1
    done
}}

attach
echo "SIZE $(($(cat /sys/block/nbd0/size) * 512))"
for name in write_cache fua discard_max_bytes rotational logical_block_size; do
    echo "QUEUE $name $(cat /sys/block/nbd0/queue/$name)"
done

/sbin/mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
mkdir /mnt/files
for i in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=/mnt/files/$i bs=64k count=$((i * 4)) 2>/dev/null &
done
wait
dd if=/dev/urandom of=/mnt/files/synced bs=4k count=64 conv=fsync 2>/dev/null
dd if=/dev/urandom of=/mnt/gone bs=1M count=16 2>/dev/null
sync
rm /mnt/gone
(cd /mnt && md5sum files/*) >/tmp/sums
echo "FILES $(wc -l </tmp/sums)"
umount /mnt
mount -t ext4 /dev/nbd0 /mnt
echo "TRIMMED $(/sbin/fstrim -v /mnt)"
umount /mnt
detach
echo DETACHED

attach
/sbin/e2fsck -f -n /dev/nbd0
echo FSCK-CLEAN
mount -t ext4 -o ro /dev/nbd0 /mnt
(cd /mnt && md5sum -c -s /tmp/sums)
echo SUMS-EQUAL
umount /mnt
detach
"""


@pytest.mark.guest
@pytest.mark.timeout(240)
def test_linux_attaches_and_keeps_a_file_system(
    kernel: Kernel, served: Callable[..., ServedProcess], tmp_path: Path
) -> None:
    qemu, qemu_img = find_tool("qemu-system-x86_64"), find_tool("qemu-img")
    names = ("nbd-client", "mkfs.ext4", "e2fsck", "fstrim")
    programs = [Path(find_tool(name)) for name in names]
    port = find_free_port()
    image = tmp_path / "disk.qcow2"
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", image, "256M"], check=True)
    guest = build_guest(kernel, SCRIPT.format(port=port, export=""), programs, MODULES)
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(guest.pack())

    server = served(image, "--listen", f"127.0.0.1:{port}")
    lines = run_guest(qemu, kernel, initramfs, timeout=180)
    print("\n".join(lines))
    server.stop()

    assert f"SIZE {256 << 20}" in lines
    queue = dict(re.findall(r"^QUEUE (\S+) (.*)$", "\n".join(lines), re.MULTILINE))
    assert queue["write_cache"] == "write back"
    assert queue["fua"] == "1"
    assert int(queue["discard_max_bytes"]) > 0
    assert queue["rotational"] == "0"
    assert "FILES 9" in lines
    (trimmed,) = re.findall(r"^TRIMMED .*\((\d+) bytes\)", "\n".join(lines), re.M)
    assert int(trimmed) >= 16 << 20
    for marker in ("DETACHED", "FSCK-CLEAN", "SUMS-EQUAL"):
        assert marker in lines
    subprocess.run([qemu_img, "check", "-q", image], check=True)
