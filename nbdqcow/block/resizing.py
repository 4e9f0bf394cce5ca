"""What a disk needs before it grows: nothing old may come to light."""

from typing import TYPE_CHECKING

from nbdqcow.types import COMPRESSED, DATA, UNALLOCATED

if TYPE_CHECKING:
    from nbdqcow.block.node import Node


async def prepare_growing(node: "Node", size: int) -> None:
    """Tell the driver about the backing image, and zero what the last cluster
    has behind the end of the disk, as far as ``size`` shows it: a larger disk
    may have ended there once."""
    driver, backing = node.driver, node.backing
    driver.backing_size = 0 if backing is None else backing.size
    offset, unit = node.size, driver.cluster_size
    end = min(-(-offset // unit) * unit, size)
    while offset < end:
        kind, _, covered = await driver.map(offset, end - offset)
        if kind in (DATA, COMPRESSED) or (
            kind == UNALLOCATED and driver.backing_size > offset
        ):
            await node.write_zero_bytes(offset, end - offset)
            return
        offset += covered
