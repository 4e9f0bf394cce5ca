"""What is created on a block device: a file plays one."""

import pytest

from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.tool import Qcow2Tool
from nbdqcow.formats.raw_tool import RawTool
from nbdqcow.storage.blocking import BlockingLocalFile

OLD = b"QFI\xfb" * 1024


@pytest.fixture
def device(tmp_path, monkeypatch):
    monkeypatch.setattr(BlockingLocalFile, "is_device", True)
    (tmp_path / "device").write_bytes(OLD)
    file = BlockingLocalFile.open(str(tmp_path / "device"), read_only=False)
    yield file
    file.close()


def test_a_device_keeps_its_length(device):
    device.truncate(0)
    device.truncate(4096)
    with pytest.raises(ImageError, match=r"^Cannot grow device files$"):
        device.truncate(4097)
    assert device.pread(0, 4096) == OLD


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"size": 8192}, "Cannot grow device files"),
        ({"size": 4096, "preallocation": "full"}, "Unsupported preallocation mode"),
        ({"size": 8192, "preallocation": "falloc"}, "Unsupported preallocation mode"),
    ],
)
def test_what_a_device_is_not_for(device, values, reason):
    """Nothing of it is written over by then."""
    tool = RawTool()
    with pytest.raises(ImageError, match=f"^{reason}"):
        tool.create(device, tool.prepare(values))
    assert device.pread(0, 4096) == OLD


def test_raw_hides_an_old_header(device):
    tool = RawTool()
    tool.create(device, tool.prepare({"size": 2048}))
    assert device.pread(0, 4096) == bytes(512) + OLD[512:]


def test_qcow2_that_is_too_long(device):
    tool = Qcow2Tool()
    plan = tool.prepare({"size": 1 << 20, "preallocation": "metadata"})
    with pytest.raises(ImageError, match=r"^Could not resize image: Cannot grow dev"):
        tool.create(device, plan)
    assert device.pread(0, 4096) == OLD
