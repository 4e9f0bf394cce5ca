"""Sizes at the limits, and disks without space, given to qemu-img and to us."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import find_tool
from tests.interop.img_programs import run_ours, run_theirs
from tests.small_disk import remount, small_disk

ONE = "--object secret,id=s,data=one"
SIZES = (
    *("9223372036854775807", "9223372036854775296", "9223372036854774784"),
    *("9223372035781033984", "9223372035781033473", "8191P", "8E", "1P"),
)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_no_disk_has(size: str, tmp_path: Path) -> None:
    said = []
    for run in (run_theirs, run_ours):
        directory = tmp_path / run.__name__
        directory.mkdir()
        for format_ in ("raw", "qcow2"):
            said.append(run(f"create -f {format_} n.{format_} {size}", directory))
            assert run_theirs(f"create -f {format_} d.{format_} 1M", directory)[0] == 0
            said.append(run(f"resize -f {format_} d.{format_} {size}", directory))
            said.append(run(f"measure -O {format_} --size {size}", directory))
    assert said[len(said) // 2 :] == said[: len(said) // 2]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_disk(tmp_path, 1 << 20) as mounted:
        if not mounted:
            pytest.skip("nothing can be mounted")
        yield tmp_path


@pytest.mark.parametrize("format_", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_no_space_for_preallocation(format_: str, mode: str, tiny: Path) -> None:
    said = []
    for run in (run_theirs, run_ours):
        for line in (
            f"create -f {format_} -o preallocation={mode} x 3M",
            f"create -f {format_} x 100k",
            f"resize -f {format_} --preallocation={mode} x 5M",
        ):
            said.append(run(line, tiny))
            if "preallocation" in line:
                (tiny / "x").unlink(missing_ok=True)
    assert said[3:] == said[:3]
    assert said[3][0] == said[5][0] == 1


def test_other_lines_without_space(tiny: Path, tmp_path_factory) -> None:
    """QEMU's words, and nothing is left of what could not be made."""
    sources = tmp_path_factory.mktemp("sources")
    over, r = sources / "over.qcow2", sources / "r.raw"
    base = sources / "base.qcow2"
    run_theirs("create -f qcow2 base.qcow2 4M", sources)
    write = ["-f", "qcow2", "-c", "write -P 1 0 4M", str(base)]
    subprocess.run([find_tool("qemu-io"), *write], check=True, capture_output=True)
    run_theirs(f"create -f qcow2 -b {base} -F qcow2 over.qcow2", sources)
    run_theirs("create -f raw r.raw 1000k", sources)
    said: list[object] = []
    for run in (run_theirs, run_ours):
        for free, line in (
            (0, "create -f raw x 3M"),
            (0, "create -f qcow2 x 3M"),
            (0, f"create {ONE} -f luks -o key-secret=s,iter-time=10 x 3M"),
            (900, "create -f qcow2 -o cluster_size=512,preallocation=metadata x 256M"),
            (900, "create -f qcow2 -o data_file=d,preallocation=full x 3M"),
            (900, "create -f qcow2 -o data_file=d,preallocation=falloc x 3M"),
            (500, "rebase -b '' over.qcow2"),
            (500, "resize -f raw --preallocation=full r.raw 5M"),
        ):
            for source in (over, r):
                if source.name in line:
                    subprocess.run(["cp", "--sparse=always", source, tiny], check=True)
            with (tiny / "fill").open("wb") as file, contextlib.suppress(OSError):
                file.write(bytes((1024 - free) << 10))
            said.append((line, run(line, tiny)))
            left = {p.name: p.stat().st_size for p in tiny.iterdir() if p.is_file()}
            said.append({n: left[n] for n in ("x", "d", r.name) if n in left})
            for path in tiny.iterdir():
                if path.is_file():
                    path.unlink()
    half = len(said) // 2
    assert said[half:] == said[:half]
    assert not (tiny / "d").exists()


def test_convert_of_a_disk_that_no_file_system_takes(tmp_path: Path) -> None:
    assert run_theirs("create -q -f qcow2 -o cluster_size=2M n 64P", tmp_path)[0] == 0
    assert run_ours("convert n m", tmp_path) == run_theirs("convert n m", tmp_path)


def test_commit_into_an_image_that_can_not_be_written_to(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("overlay")
    base = tiny / "base"
    for line in (
        f"create -q -f qcow2 {base} 1M",
        f"create -q -f qcow2 -F qcow2 -b {base} top",
    ):
        assert run_theirs(line, directory)[0] == 0
    remount(tiny, "ro")
    expected = run_theirs("commit top", directory)
    assert expected[0] == 1
    assert run_ours("commit top", directory) == expected


@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k"])
@pytest.mark.parametrize(
    "line", ["commit top", "rebase -f qcow2 -b '' x", "bench -q -w -c 400 -f qcow2 x"]
)
def test_nothing_leaks_where_a_full_disk_ends_a_command(
    line: str, cluster_size: str, tiny: Path, tmp_path_factory
) -> None:
    """QEMU's own leaves leaks behind `commit` and `bench`."""
    directory = tmp_path_factory.mktemp("elsewhere")
    disk = tiny / "x"
    for name in ("below", "top"):
        create = f"create -f qcow2 -o cluster_size={cluster_size} {name} 8M"
        assert run_theirs(create, directory)[0] == 0
        fill = ["-f", "qcow2", "-c", "write -P 1 0 3M", str(directory / name)]
        subprocess.run([find_tool("qemu-io"), *fill], check=True, capture_output=True)
    for name, below in ((disk, directory / "below"), (directory / "top", disk)):
        if name == disk:
            create = f"create -f qcow2 -o cluster_size={cluster_size} {disk} 8M"
            assert run_theirs(create, directory)[0] == 0
            if line.startswith("commit"):
                continue
        rebase = f"rebase -u -f qcow2 -F qcow2 -b {below} {name}"
        assert run_theirs(rebase, directory)[0] == 0
    assert run_ours(line.replace(" x", f" {disk}"), directory)[0] == 1
    assert run_theirs(f"check -f qcow2 {disk}", directory)[0] == 0
