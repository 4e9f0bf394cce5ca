"""qcow images (version 1) and QEMU: each reads and goes on with the other's."""

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdqcow import open_image
from nbdqcow.block.node import Node
from tests.interop.img_versions import as_7_2_says, text_as_7_2_says
from tests.pairwise import pairwise
from tests.qcow1_image import Image, Packed, Plain, check
from tests.serving import compare_images, nbdqcow_img, need, run, serving

KiB, MiB = 1 << 10, 1 << 20
KEY = b"0123456789abcdefand more"
SECRET = ("--object", f"secret,id=s,data={KEY.decode()}")

pytestmark = pytest.mark.usefixtures("qemu")


@pytest.fixture
def qemu() -> None:
    need("qemu-img", "qemu-io")


def options_of(case: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in case.items())


def image_options(path: Path, key: bytes | None, **more: str) -> list[str]:
    options = f"driver=qcow,file.filename={path}"
    if key is not None:
        options += ",encrypt.key-secret=s"
    return ["--image-opts", options + "".join(f",{k}={v}" for k, v in more.items())]


def content_by_qemu(path: Path, key: bytes | None) -> bytes:
    flat = path.with_suffix(".flat")
    secret = SECRET if key is not None else ()
    run("qemu-img", "convert", *secret, *image_options(path, key), "-O", "raw", flat)
    return flat.read_bytes()


def opened(path: Path, key: bytes | None = None) -> Any:
    return open_image(path, format="qcow", driver_options={"secret": key})


async def whole_content(node: Node) -> bytes:
    return bytes(await node.pread(0, node.size))


def random_clusters(rnd: random.Random, bits: int, nb: int) -> dict[int, Any]:
    clusters: dict[int, Any] = {}
    for index in rnd.sample(range(nb), nb * 2 // 3):
        if rnd.random() < 0.4:
            clusters[index] = Packed(rnd.randbytes(150) * 2, rnd.randrange(1, 10))
        else:
            clusters[index] = Plain(rnd.randbytes(1 << bits))
    return clusters


# -- new images ----------------------------------------------------------------


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("backing", [None, "base.raw", "a-rather-long-name" * 40])
@pytest.mark.parametrize("size", ["512", "513", "3M", "5G"])
def test_new_images_are_qemus_byte_for_byte(tmp_path, size, backing, encrypted):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    words = ["-u", "-b", backing, "-F", "raw"] if backing else []
    if encrypted:
        # The key has no place in the image, but it is asked for.
        words += [*SECRET, "-o", "encryption=on,encrypt.key-secret=s"]
    run("qemu-img", "create", "-qf", "qcow", *words, theirs, size)
    nbdqcow_img("create", "-qf", "qcow", *words, ours, size)
    assert ours.read_bytes() == theirs.read_bytes()


def describe(program: str, *words: str | Path) -> tuple[int, str, str]:
    command = [program]
    if program != "qemu-img":
        code = "import sys; from nbdqcow.cli.img import main; sys.exit(main())"
        command = [sys.executable, "-c", code]
    texts = list(map(str, words))
    done = subprocess.run([*command, *texts], capture_output=True, timeout=60)
    status, out, err = done.returncode, done.stdout, done.stderr.rstrip()
    if program == "qemu-img":
        status, out, err = as_7_2_says(texts, (status, out, err))
    return status, out.decode(), err.decode().strip().partition(": ")[2]


@pytest.mark.parametrize(
    "words",
    [
        ("info", "NAME"),
        ("info", "--output=json", "NAME"),
        ("info", "-f", "qcow", "--backing-chain", "NAME"),
        ("info", "-f", "qcow2", "NAME"),
        ("info", "SECRET"),
        ("info", "--output=json", "SECRET"),
        ("check", "NAME"),
        ("check", "-f", "qcow", "--output=json", "NAME"),
        ("check", "-r", "all", "NAME"),
        ("create", "-f", "qcow", "-o", "help"),
        ("create", "-f", "qcow", "-o", "encrypt.format=luks", "NEW", "1M"),
        ("create", "-f", "qcow", "-o", "encryption=on,encrypt.format=aes", "NEW", "1M"),
        ("create", "-f", "qcow", "-o", "encryption=on", "NEW", "1M"),
        ("create", "-f", "qcow", "-o", "cluster_size=4096", "NEW", "1M"),
        ("create", "-f", "qcow", "NEW", "0"),
        ("create", "-f", "qcow", "-b", "NAME", "-F", "qcow", "NEW"),
        ("create", "-f", "qcow", "-b", "NAME", "NEW"),
    ],
)
def test_commands_speak_as_qemus(tmp_path, words):
    base, path = tmp_path / "base.raw", tmp_path / "a.qcow"
    base.write_bytes(bytes(3 * MiB))
    run("qemu-img", "create", "-qf", "qcow", "-b", base, "-F", "raw", path)
    secret = tmp_path / "secret.qcow"
    secret.write_bytes(Image(MiB, key=KEY, clusters={0: Plain(b"x")}).build())
    answers = []
    for program in ("qemu-img", "ours"):
        new = tmp_path / "new"
        new.unlink(missing_ok=True)
        names = {"NAME": path, "NEW": new, "SECRET": secret}
        answers.append(describe(program, *(names.get(w, w) for w in words)))
    assert answers[1] == answers[0]


# -- images that others made ---------------------------------------------------


@pytest.mark.parametrize(
    "case",
    list(
        pairwise(
            bits=(9, 10, 12, 16),
            l2_bits=(6, 9, 12, 13),
            key=(None, KEY),
            backing=(False, True),
            gap=(0, 512, 1536),
            name_at_end=(False, True),
            odd_size=(0, 512),
        )
    ),
    ids=options_of,
)
def test_built_images_are_read_and_continued_by_both(tmp_path, seed, case):
    rnd = random.Random(seed)
    base, path = tmp_path / "base.raw", tmp_path / "a.qcow"
    below = rnd.randbytes(40 << 9)
    base.write_bytes(below)
    image = Image(
        (50 << case["bits"]) - case["odd_size"],
        case["bits"],
        case["l2_bits"],
        random_clusters(rnd, case["bits"], 49),
        backing=str(base).encode() if case["backing"] else b"",
        key=case["key"],
        gap=case["gap"],
        name_at_end=case["name_at_end"],
    )
    path.write_bytes(image.build())
    check(path)
    if not case["backing"]:
        below = b""
    disk = bytearray(image.content(below))
    assert content_by_qemu(path, case["key"]) == disk

    async def read_and_change() -> None:
        async with opened(path, case["key"]) as node:
            assert await whole_content(node) == disk
            for _ in range(12):
                offset = rnd.randrange(node.size)
                data = rnd.randbytes(
                    rnd.randrange(1, min(9000, node.size - offset) + 1)
                )
                await node.pwrite(offset, data)
                disk[offset : offset + len(data)] = data
            if case["key"] is None:
                start = rnd.randrange(40) << case["bits"]
                data = (b"%d " % start * 40000)[: 1 << case["bits"]]
                await node.driver.write_compressed(start, data)
                disk[start : start + len(data)] = data
            assert await whole_content(node) == disk

    asyncio.run(read_and_change())
    check(path)
    assert content_by_qemu(path, case["key"]) == disk
    if case["backing"] and case["bits"] > 9:
        # QEMU copies nothing from a backing file into a larger cluster.
        return
    commands = []
    for _ in range(8):
        offset = rnd.randrange(len(disk) // 512) * 512
        length = min(len(disk) - offset, rnd.randrange(1, 20) * 512)
        touched = range(offset >> case["bits"], (offset + length >> case["bits"]) + 1)
        if case["key"] and any(
            isinstance(image.clusters.get(index), Packed) for index in touched
        ):
            # QEMU 7.2 forgets to encrypt what it takes from a compressed cluster
            # that it writes part of.
            continue
        pattern = rnd.randrange(256)
        commands += ["-c", f"write -P {pattern} {offset} {length}"]
        disk[offset : offset + length] = bytes([pattern]) * length
    secret = SECRET if case["key"] else ()
    if commands:
        run("qemu-io", *secret, *commands, *image_options(path, case["key"]))
    check(path)

    async def read_again() -> None:
        async with opened(path, case["key"]) as node:
            assert await whole_content(node) == disk

    asyncio.run(read_again())


def test_qemus_compressed_images_are_read_and_overwritten(tmp_path, seed):
    rnd = random.Random(seed)
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow"
    disk = bytearray()
    for _ in range(200):
        disk += rnd.choice((rnd.randbytes(4096), rnd.randbytes(64) * 64, bytes(4096)))
    raw.write_bytes(disk)
    # Its last step fails in QEMU 7.2, with the image complete.
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow", "-c", raw, path, check=False)
    check(path)

    async def change() -> None:
        async with opened(path) as node:
            assert await whole_content(node) == disk
            for _ in range(100):
                offset = rnd.randrange(node.size - 6000)
                data = rnd.randbytes(rnd.randrange(1, 6000))
                await node.pwrite(offset, data)
                disk[offset : offset + len(data)] = data

    asyncio.run(change())
    check(path)
    raw.write_bytes(disk)
    compare_images(raw, path, second_format="qcow")


def test_what_we_compress_qemu_reads(tmp_path, seed):
    rnd = random.Random(seed)
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow"
    size = 100 * 4096 + 512
    run("qemu-img", "create", "-qf", "qcow", path, size)
    clusters = [rnd.randbytes(4096) for _ in range(33)]
    clusters += [rnd.randbytes(64) * 64 for _ in range(34)]
    clusters += [rnd.randbytes(1) * 4096 for _ in range(34)]
    rnd.shuffle(clusters)
    disk = b"".join(clusters)[:size]

    async def write() -> None:
        async with opened(path) as node:
            await asyncio.gather(
                *(
                    node.driver.write_compressed(offset, disk[offset : offset + 4096])
                    for offset in range(0, size, 4096)
                )
            )

    asyncio.run(write())
    check(path)
    # A plain cluster is aligned: it may cost as much as two.
    assert path.stat().st_size < size * 3 // 4
    raw.write_bytes(disk)
    compare_images(raw, path, second_format="qcow")


# -- serving -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "bottom"),
    [("qcow", "raw"), ("qcow", "qcow"), ("qcow", "qcow2"), ("qcow2", "qcow")],
)
def test_chains_are_served(tmp_path, top, bottom):
    need("nbdcopy")
    base, path, flat = (tmp_path / name for name in ("base", "top", "flat"))
    run("qemu-img", "create", "-qf", bottom, base, "6M")
    run("qemu-io", "-f", bottom, "-c", "write -P 7 1M 3M", base)
    run("qemu-img", "create", "-qf", top, "-b", base, "-F", bottom, path, "8M")
    before = base.read_bytes()
    with serving(path, image_format=top) as server:
        run("qemu-io", "-f", "raw", "-c", "write -P 9 1000k 100k", server.uri)
        run("qemu-io", "-f", "raw", "-c", "write -z 3M 7k", server.uri)
        run("nbdcopy", server.uri, flat)
    content = bytearray(8 * MiB)
    content[MiB : 4 * MiB] = b"\7" * (3 * MiB)
    content[1000 * KiB : 1100 * KiB] = b"\x09" * (100 * KiB)
    content[3 * MiB : 3 * MiB + 7 * KiB] = bytes(7 * KiB)
    assert flat.read_bytes() == content
    compare_images(flat, path, second_format=top)
    assert base.read_bytes() == before
    if top == "qcow":
        check(path)


def test_an_old_image_is_probed_and_served(tmp_path, served):
    path, socket = tmp_path / "old.qcow", tmp_path / "socket"
    run("qemu-img", "create", "-qf", "qcow", path, "4M")
    served(path, "--unix", socket)
    uri = f"nbd+unix:///?socket={socket}"
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "flush", uri)
    done = run("qemu-img", "map", "--output=json", "-f", "raw", uri)
    assert '"data": true' in done.stdout


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, served, monkeypatch):
    key_file = tmp_path / "key"
    key_file.write_bytes(KEY)
    monkeypatch.setenv("THE_KEY", KEY.decode())
    path = tmp_path / "old.qcow"
    image = Image(MiB, clusters={3: Plain(b"hello" * 800)}, key=KEY)
    path.write_bytes(image.build())
    for number, source in enumerate(
        (("--key-file", key_file), ("--key-env", "THE_KEY"))
    ):
        socket = tmp_path / f"s{number}"
        server = served(path, "--unix", socket, *source)
        uri = f"nbd+unix:///?socket={socket}"
        pattern = f"write -P {number} {number}k 1k"
        run("qemu-io", "-f", "raw", "-c", pattern, "-c", "flush", uri)
        server.stop()
    content = content_by_qemu(path, KEY)
    assert content[: 2 * KiB] == bytes(KiB) + b"\1" * KiB
    assert content[3 * 4096 :].startswith(b"hello" * 800)


def test_a_command_line_of_qemu_nbds(tmp_path, served):
    path, socket = tmp_path / "old.qcow", tmp_path / "socket"
    secret = tmp_path / "secret"
    secret.write_bytes(KEY)
    image = Image(MiB, clusters={3: Plain(b"hello" * 800)}, key=KEY)
    path.write_bytes(image.build())
    command = "import sys; from nbdqcow.cli.nbd import main; sys.exit(main())"
    served(
        *("--object", f"secret,id=s,file={secret}", "-t", "-k", socket, "--image-opts"),
        f"driver=qcow,encrypt.key-secret=s,file.filename={path}",
        command=[sys.executable, "-c", command],
        is_ready=socket.exists,
    )
    uri = f"nbd+unix:///?socket={socket}"
    run("qemu-io", "-f", "raw", "-c", "write -P 5 20k 3k", uri)
    run("qemu-io", "-f", "raw", "-c", "read -P 5 20k 3k", uri)
    done = run("qemu-io", "-f", "raw", "-c", "read -v 12k 16", uri)
    assert "hellohello" in done.stdout


@pytest.mark.parametrize("image_format", ["qcow", "raw"])
def test_there_are_no_snapshots_to_load(tmp_path, image_format):
    path = tmp_path / "a"
    run("qemu-img", "create", "-qf", image_format, path, "1M")
    answers = []
    for program in ("qemu-nbd", "ours"):
        command = [program]
        if program == "ours":
            code = "import sys; from nbdqcow.cli.nbd import main; sys.exit(main())"
            command = [sys.executable, "-c", code]
        words = ["-f", image_format, "-l", "snap", "-k", str(tmp_path / "s"), str(path)]
        done = run(*command, *words, check=False)
        text = done.stderr.strip().rpartition(": ")[2]
        answers.append((done.returncode, text.replace(" used by device ''", "")))
    assert answers[1] == answers[0]


def test_the_rename_command_keeps_the_link(tmp_path):
    (tmp_path / "archive").mkdir()
    base, path = tmp_path / "base.raw", tmp_path / "a.qcow"
    base.write_bytes(b"b" * MiB)
    link = ("-b", "base.raw", "-F", "raw")
    run("qemu-img", "create", "-qf", "qcow", *link, path, "1M")
    moved = tmp_path / "archive" / "b.qcow"
    nbdqcow_img("rename", "-f", "qcow", path, moved)
    assert not path.exists()
    check(moved)
    assert "backing file: ../base.raw" in run("qemu-img", "info", moved).stdout
    compare_images(base, moved, second_format="qcow")
    # Nothing of the backing file is needed.
    base.rename(tmp_path / "elsewhere")
    nbdqcow_img("rename", moved, path)
    assert "backing file: base.raw" in run("qemu-img", "info", path).stdout
    path.rename(moved)
    (tmp_path / "elsewhere").rename(base)
    done = describe("ours", "rename", moved, base)
    assert done[0] == 1
    assert done[2] == f"Could not rename '{moved}' to '{base}': File exists"
    assert base.read_bytes() == b"b" * MiB


def test_images_are_converted_and_compared(tmp_path, seed):
    rnd = random.Random(seed)
    raw, flat = tmp_path / "a.raw", tmp_path / "flat"
    kinds = (rnd.randbytes, lambda n: rnd.randbytes(64) * (n // 64), bytes)
    raw.write_bytes(
        b"".join(rnd.choice(kinds)(4096) for _ in range(300)) + b"end" * 171
    )
    size = -(-raw.stat().st_size // 512) * 512
    for words in ((), ("-c",), ("-c", "-m", "8"), ("-W",)):
        path = tmp_path / "a.qcow"
        nbdqcow_img("convert", "-f", "raw", "-O", "qcow", *words, raw, path)
        check(path)
        compare_images(raw, path, second_format="qcow")
        nbdqcow_img("compare", "-f", "raw", "-F", "qcow", raw, path)
        nbdqcow_img("convert", "-f", "qcow", "-O", "raw", path, flat)
        assert flat.read_bytes() == raw.read_bytes().ljust(size, b"\0")
        ours = nbdqcow_img("map", "--output=json", "-f", "qcow", path).stdout
        theirs = run("qemu-img", "map", "--output=json", "-f", "qcow", path).stdout
        assert json.loads(ours) == json.loads(text_as_7_2_says(theirs))


@pytest.mark.parametrize(
    "words",
    [
        ("resize", "-f", "qcow", "NAME", "8M"),
        ("amend", "-f", "qcow", "-o", "size=8M", "NAME"),
        ("snapshot", "-c", "snap", "NAME"),
    ],
)
def test_what_the_format_lacks_is_refused_as_by_qemu(tmp_path, words):
    path = tmp_path / "a.qcow"
    run("qemu-img", "create", "-qf", "qcow", path, "1M")
    before = path.read_bytes()
    answers = [
        describe(program, *(path if word == "NAME" else word for word in words))
        for program in ("qemu-img", "ours")
    ]
    assert answers[1] == answers[0]
    assert path.read_bytes() == before


def test_overlays_are_committed_and_rebased(tmp_path):
    base, top, other, want = (tmp_path / n for n in ("base", "top", "other", "want"))
    run("qemu-img", "create", "-qf", "qcow", base, "4M")
    run("qemu-io", "-f", "qcow", "-c", "write -P 1 0 2M", base)
    run("qemu-img", "create", "-qf", "qcow", "-b", base, "-F", "qcow", top)
    run("qemu-io", "-f", "qcow", "-c", "write -P 2 1M 2M", top)
    run("qemu-img", "convert", "-f", "qcow", "-O", "raw", top, want)
    run("qemu-img", "create", "-qf", "qcow", other, "4M")
    nbdqcow_img("rebase", "-f", "qcow", "-b", other, "-F", "qcow", top)
    compare_images(want, top, second_format="qcow")
    assert f"backing file: {other}" in run("qemu-img", "info", top).stdout
    nbdqcow_img("commit", "-q", "-f", "qcow", top)
    # All of it is below now, and the overlay as short as a new one.
    assert check(top) == 0
    assert top.stat().st_size < 4096
    for image in (top, other):
        compare_images(want, image, second_format="qcow")
    check(other)
    nbdqcow_img("rebase", "-f", "qcow", "-b", "", top)
    compare_images(want, top, second_format="qcow")
    assert "backing file" not in run("qemu-img", "info", top).stdout
    check(top)
