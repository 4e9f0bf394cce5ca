"""Repair of an image that was not closed while its refcounts were postponed.

Source: qcow2.txt, "Dirty bit".
"""

import logging

from nbdqcow.block.steps import run_steps
from nbdqcow.block.storage import StorageDriver
from nbdqcow.block.tools import REPAIR_ALL
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2 import header as qcow2_header
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.formats.qcow2.snapshot_table import read_snapshots

log = logging.getLogger(__name__)


async def repair_dirty(storage: StorageDriver, header: Header) -> Header:
    """Make the refcounts right, clear the mark, and return the new header.

    Raises `ImageError` if more is wrong than that.
    """
    # It brings numpy, which other images need not pay.
    from nbdqcow.formats.qcow2.check import check_image

    # One that can't be read whole must not be shortened by just opening an image.
    await run_steps(read_snapshots(header), storage)
    log.info("%s: it was not closed: repairing refcounts", storage.filename)

    def report(text: str) -> None:
        # QEMU's programs show it without the name.
        log.warning("%s: %s", storage.filename, text, extra={"shown": text})

    steps = check_image(
        storage.length, REPAIR_ALL, report, can_grow=storage.zero_beyond_end
    )
    result = await run_steps(steps, storage)
    if result.corruptions or result.check_errors:
        raise ImageError("Could not repair dirty image: Input/output error")
    log.info(
        "%s: repaired %d refcounts that were too low and %d that were too high",
        storage.filename,
        result.corruptions_fixed,
        result.leaks_fixed,
    )
    return await run_steps(qcow2_header.read_header(), storage)
