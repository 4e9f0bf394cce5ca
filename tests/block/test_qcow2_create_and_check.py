"""Creating and checking images on a storage driver, as a server does."""

import pytest

from nbdqcow.block.steps import run_steps
from nbdqcow.block.tools import REPAIR_ALL, REPAIR_NONE
from nbdqcow.formats.qcow2.check import check_image
from nbdqcow.formats.qcow2.create import CreateOptions, create, plan_create
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.storage.memory import MemoryStorage
from tests.builder import BytesFile, ImageBuilder


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
@pytest.mark.asyncio
async def test_create_writes_what_the_tool_writes(preallocation):
    options = CreateOptions(size=3 << 20, preallocation=preallocation)
    storage = MemoryStorage(b"old" * 100_000)
    await create(storage, options)
    file = BytesFile()
    Qcow2Tool().create(file, plan_create(options))
    assert storage.data == file.data


@pytest.mark.asyncio
async def test_a_storage_with_old_content_is_zeroed():
    storage = MemoryStorage()
    storage.zero_beyond_end = False
    await create(storage, CreateOptions(size=1 << 20))
    result = await run_steps(check_image(storage.length, REPAIR_NONE, print), storage)
    assert result.corruptions == 0


@pytest.mark.asyncio
async def test_repair_on_a_storage():
    builder = ImageBuilder()
    builder.add_data(0)
    builder.allocate()
    storage = MemoryStorage(builder.build())
    found: list[str] = []
    result = await run_steps(
        check_image(storage.length, REPAIR_ALL, found.append), storage
    )
    assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert any("Repairing cluster" in line for line in found)
    result = await run_steps(
        check_image(storage.length, REPAIR_NONE, found.append), storage
    )
    assert (result.corruptions, result.leaks) == (0, 0)
