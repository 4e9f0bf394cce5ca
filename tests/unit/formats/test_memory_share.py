"""What images keep of what they have decompressed, all together."""

import pytest

from nbdqcow.formats import memory_share
from nbdqcow.formats.memory_share import MemoryShare

MiB = 1 << 20


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    monkeypatch.setattr(memory_share, "default_budget", lambda: 64 * MiB)


def test_shares_are_equal_and_end_with_their_images():
    shares = [MemoryShare() for _ in range(4)]
    shares[0].join()
    assert shares[0].nb_bytes == 64 * MiB
    for share in shares:
        share.join()
        share.join()
    assert [share.nb_bytes for share in shares] == [16 * MiB] * 4
    shares.pop().leave()
    # One that is simply gone counts no longer.
    shares.pop()
    assert [share.nb_bytes for share in shares] == [32 * MiB] * 2
    many = [MemoryShare() for _ in range(1000)]
    for share in many:
        share.join()
    assert many[0].nb_bytes == 4 * MiB
    for share in (*shares, *many):
        share.leave()
        share.leave()


def test_an_amount_of_its_own():
    own, other = MemoryShare(123), MemoryShare()
    own.join()
    other.join()
    assert (own.nb_bytes, other.nb_bytes) == (123, 64 * MiB)
    own.leave()
    other.leave()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), 128 * MiB),
        (("max\n",), 128 * MiB),
        (("1073741824\n",), 32 * MiB),
        (("max\n", "4294967296\n"), 64 * MiB),
        (("", "9223372036854771712\n"), 128 * MiB),
    ],
)
def test_memory_of_a_container(tmp_path, monkeypatch, files, expected):
    paths = [tmp_path / str(i) for i in range(2)]
    for path, text in zip(paths, files, strict=False):
        path.write_text(text)
    monkeypatch.undo()
    monkeypatch.setattr(memory_share, "_LIMITS", tuple(paths))
    monkeypatch.setattr(
        memory_share.os,
        "sysconf",
        {"SC_PHYS_PAGES": 2 << 20, "SC_PAGE_SIZE": 4096}.get,
    )
    assert memory_share.default_budget.__wrapped__() == expected
