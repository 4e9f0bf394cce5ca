"""Key slots of an image: what may be asked for, and power cuts in between."""

import pytest

from nbdqcow import open_image
from nbdqcow.block.tools import no_secrets
from nbdqcow.crypto import luks
from nbdqcow.crypto.luks import LuksHeader, WrongPassphrase
from nbdqcow.errors import ImageError
from nbdqcow.formats.luks_keys import KeyChange, change_keys
from nbdqcow.formats.qcow2.create import CreateOptions, plan_create
from nbdqcow.formats.qcow2.encryption_header import new_encryption
from nbdqcow.storage.memory import MemoryStorage

SECRETS = {"s": b"one", "t": b"two", "u": b"three"}


class RecordingStorage(MemoryStorage):
    """Keeps what the file was before and after each write, half of it too."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.states = [data]
        self.nb_unflushed = 0

    async def pwritev(self, offset, buffers, *, fua=False):
        assert self.nb_unflushed == 0, "an edit before the last one is durable"
        self.nb_unflushed += 1
        data = b"".join(buffers)
        half = len(data) // 2
        await super().pwritev(offset, [data[:half]])
        self.states.append(bytes(self.data))
        await super().pwritev(offset + half, [data[half:]])
        self.states.append(bytes(self.data))

    async def flush(self):
        self.nb_unflushed = 0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(luks, "_CALIBRATION_SECONDS", 1e-4)


@pytest.fixture(scope="module")
def area() -> bytes:
    return luks.create_blocking(b"one", iteration_ms=1)[2]


def opens(area: bytes, passphrase: bytes) -> bool:
    try:
        LuksHeader.parse(area).unlock_blocking(area, passphrase)
    except WrongPassphrase:
        return False
    return True


def opening(area: bytes) -> set[bytes]:
    """Return the passphrases that open a header."""
    return {passphrase for passphrase in SECRETS.values() if opens(area, passphrase)}


def change(state: str, *, force: bool = False, **values: str | int) -> KeyChange:
    options = {name.replace("_", "-"): value for name, value in values.items()}
    if state == "active":
        options.setdefault("iter-time", 1)
    return KeyChange.parse(
        {"state": state, **options}, "", SECRETS.__getitem__, force=force
    )


async def apply(
    area: bytes, *changes: KeyChange, passphrase: bytes = b"one"
) -> list[bytes]:
    storage = RecordingStorage(area)
    for one in changes:
        await change_keys(storage, 0, len(area), passphrase, one)
    return storage.states


@pytest.mark.asyncio
async def test_somebody_can_always_open_the_disk(area):
    states = await apply(area, change("active", new_secret="t"))
    assert all(opens(state, b"one") for state in states)
    assert opening(states[-1]) == {b"one", b"two"}

    states = await apply(states[-1], change("inactive", old_secret="s"))
    assert all(opens(state, b"two") for state in states)
    assert opening(states[-1]) == {b"two"}

    # The last slot itself is written anew, in place.
    overwrite = change("active", new_secret="u", keyslot=1, force=True)
    states = await apply(states[-1], overwrite, passphrase=b"two")
    assert all(opens(state, b"two") or opens(state, b"three") for state in states)
    assert opening(states[-1]) == {b"three"}
    header = LuksHeader.parse(states[-1])
    assert [slot.active for slot in header.slots] == [False, True] + [False] * 6


@pytest.mark.asyncio
async def test_what_was_erased_is_gone(area):
    two = (await apply(area, change("active", new_secret="t", keyslot=7)))[-1]
    erased = (await apply(two, change("inactive", keyslot=0)))[-1]
    start = LuksHeader.parse(erased).slots[0].material_sector * 512
    assert erased[start : start + 256_000] != two[start : start + 256_000]
    # Once more: after a power cut the material may still be there.
    wipe = change("inactive", keyslot=0, force=True)
    again = (await apply(erased, wipe, passphrase=b"two"))[-1]
    assert again[start : start + 256_000] != erased[start : start + 256_000]
    assert opening(again) == {b"two"}


@pytest.mark.asyncio
async def test_refused_changes_write_nothing(area):
    for wrong, text in (
        (change("active", new_secret="t", keyslot=0), "Refusing to overwrite"),
        (change("inactive", keyslot=0), "the only active keyslot 0"),
        (change("inactive", keyslot=1), "keyslot 1 is already erased"),
        (change("inactive", keyslot=0, old_secret="t"), "given old password"),
        (change("inactive", old_secret="t"), "No keyslots match"),
        (change("inactive", old_secret="s"), "All the active keyslots match"),
    ):
        storage = RecordingStorage(area)
        with pytest.raises(ImageError, match=text):
            await change_keys(storage, 0, len(area), b"one", wrong)
        assert len(storage.states) == 1
    storage = RecordingStorage(area)
    with pytest.raises(WrongPassphrase):
        add = change("active", new_secret="t")
        await change_keys(storage, 0, len(area), b"two", add)
    assert len(storage.states) == 1


@pytest.mark.asyncio
async def test_all_slots_in_use(area):
    full = (await apply(area, *[change("active", new_secret="t")] * 7))[-1]
    erased = (await apply(full, change("inactive", old_secret="t")))[-1]
    assert [slot.active for slot in LuksHeader.parse(erased).slots] == [True] + [
        False
    ] * 7
    with pytest.raises(ImageError, match="all keyslots are in use"):
        await apply(full, change("active", new_secret="u"))
    force = change("active", new_secret="u", keyslot=3, force=True)
    states = await apply(full, force)
    assert all(opens(state, b"one") for state in states)
    assert opens(states[-1], b"three")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "Parameter 'state' is missing"),
        ({"state": "foo"}, "Parameter 'state' does not accept value 'foo'"),
        ({"state": "active"}, "'new-secret' is required"),
        ({"state": "active", "new-secret": "t", "old-secret": "s"}, "'old-secret' mus"),
        ({"state": "inactive", "new-secret": "t"}, "'new-secret' must not"),
        ({"state": "inactive", "iter-time": 1}, "'iter-time' must not"),
        ({"state": "inactive"}, "either explicit keyslot index or the password"),
        ({"state": "inactive", "keyslot": 8}, "Invalid keyslot 8 specified"),
        ({"state": "inactive", "keyslot": -1}, "Invalid keyslot 4294967295"),
        ({"state": "active", "new-secret": "x"}, "No secret with id 'x'"),
    ],
)
def test_parse_refuses(values, text):
    with pytest.raises(ImageError, match=text):
        KeyChange.parse(values, "", no_secrets)


async def create(tmp_path, **values):
    """Make an image of 1 MiB as ``encrypt.*`` options say."""
    named = {f"encrypt.{name.replace('_', '-')}": v for name, v in values.items()}
    encryption = new_encryption(named, SECRETS.__getitem__)
    plan = plan_create(CreateOptions(size=1 << 20, encryption=encryption))
    path = tmp_path / "disk.qcow2"
    with path.open("wb") as file:
        for offset, data in (*plan.writes(), plan.magic_write):
            file.seek(offset)
            file.write(data)
        file.truncate(plan.file_length)
    return path


@pytest.mark.asyncio
async def test_slots_of_an_image_in_use(tmp_path):
    path = await create(tmp_path, format="luks", key_secret="s", iter_time=1)
    add = {"encrypt.state": "active", "encrypt.new-secret": "t", "encrypt.iter-time": 1}
    erase = {"encrypt.state": "inactive", "encrypt.old-secret": "s"}
    async with open_image(
        path, format="qcow2", driver_options={"secret": b"one"}
    ) as node:
        await node.pwrite(1000, b"content")
        await node.driver.amend_keys(add, SECRETS.__getitem__)
        await node.driver.amend_keys(erase, SECRETS.__getitem__)
        assert await node.pread(1000, 7) == b"content"
    async with open_image(
        path, format="qcow2", driver_options={"secret": b"two"}
    ) as node:
        assert await node.pread(1000, 7) == b"content"
    with pytest.raises(ImageError, match="Invalid password"):
        await open_image(path, format="qcow2", driver_options={"secret": b"one"})


@pytest.mark.asyncio
async def test_only_luks_has_slots(tmp_path):
    for values, text in (
        ({"format": "aes", "key_secret": "s"}, "Only LUKS encryption options"),
        ({}, "encryption not present"),
    ):
        path = await create(tmp_path, **values)
        options = {"secret": b"one"}
        async with open_image(path, format="qcow2", driver_options=options) as node:
            with pytest.raises(ImageError, match=text):
                await node.driver.amend_keys({}, no_secrets)
