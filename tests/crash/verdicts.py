"""What a check says of a disk: ours, and QEMU's."""

import subprocess
from pathlib import Path

from nbdqcow.block.tools import REPAIR_NONE, CheckResult
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from tests.builder import BytesFile

SHARE_FOR_QEMU = 0.05


def check_by_us(data: bytes, repair: int = REPAIR_NONE) -> tuple[CheckResult, str]:
    lines: list[str] = []
    result = Qcow2Tool().check(BytesFile(data), repair, lines.append)
    return result, "\n".join(lines)


def is_sound(result: CheckResult, *, leaks: bool = True) -> bool:
    return not (
        result.corruptions or result.check_errors or (result.leaks and not leaks)
    )


def check_by_qemu(path: Path, data: bytes, where: str) -> None:
    path.write_bytes(data)
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True
    )
    assert done.returncode in (0, 3), f"{where}:\n{done.stdout}{done.stderr}"
