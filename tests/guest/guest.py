"""Run a shell script as init of a Linux guest under qemu-system."""

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.guest.initramfs import Initramfs
from tests.guest.kernel import Kernel

_PRELUDE = """#!/bin/busybox sh
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
fail() { dmesg | tail -n 40; echo "GUEST-FAILED: $*"; poweroff -f; sleep 60; }
for module in $(cat /modules/order); do
    insmod /modules/$module || fail "insmod $module"
done
"""

_SCRIPT_PRELUDE = """set -ex
fail() { echo "$*"; exit 1; }
"""

_EPILOGUE = """
echo "GUEST-DONE"
poweroff -f
sleep 60
"""


def build_guest(
    kernel: Kernel, script: str, programs: Sequence[Path], modules: list[str]
) -> Initramfs:
    """Return an initramfs that loads ``modules`` and then runs ``script``.

    The programs go to /sbin (named with it, or busybox may take its own). The
    script is for its shell; ``fail REASON`` in it ends the run, and
    so does any command that fails (the shell runs with ``-ex``).
    """
    files = Initramfs()
    files.add_program("bin/busybox", Path("/bin/busybox"))
    for program in programs:
        files.add_program(f"sbin/{program.name}", program)
    order = kernel.load_order(modules)
    for name, content in order:
        files.add_file(f"modules/{name}", content)
    files.add_file("modules/order", "\n".join(n for n, _ in order).encode())
    files.add_file("script", (_SCRIPT_PRELUDE + script).encode())
    init = _PRELUDE + 'sh -c ". /script" || fail "the last command above"\n' + _EPILOGUE
    files.add_file("init", init.encode(), mode=0o755)
    return files


def run_guest(
    qemu: str, kernel: Kernel, initramfs: Path, *, timeout: float
) -> list[str]:
    """Boot the guest, and return its console's lines once it is off.

    The host's 127.0.0.1 is 10.0.2.2 to the guest. Raises `AssertionError`, with
    the console, if the guest did not say that all went well in ``timeout``
    seconds.
    """
    # Four CPUs, for the kernel uses one connection per CPU at most. The plainest
    # CPU, for each feature costs an emulated boot some seconds.
    command = [
        *(qemu, "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "qemu64"),
        *("-smp", "4", "-m", "512"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 panic=-1 quiet loglevel=3 mitigations=off"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", "stdio", "-nic", "user,model=virtio-net-pci"),
    ]
    console = bytearray()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    try:
        off = _read_until_end(process.stdout.fileno(), console, timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()
        process.stdout.close()
    text = console.decode(errors="replace").replace("\r", "")
    assert off, f"the guest still ran after {timeout:.0f} s; its console:\n{text}"
    lines = text.splitlines()
    assert "GUEST-DONE" in lines, f"the guest failed; its console:\n{text}"
    return lines


def _read_until_end(fd: int, console: bytearray, timeout: float) -> bool:
    """Collect output until end of file; False if that took too long."""
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                chunk = os.read(fd, 65536)
                if not chunk:
                    return True
                console += chunk
    return False
