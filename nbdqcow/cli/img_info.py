"""``nbdqcow-img info``: what an image says of itself."""

import mmap
import time
from collections.abc import Sequence
from typing import Any, Final

from nbdqcow.block.filter_names import innermost, shown_name
from nbdqcow.block.registry import is_remote
from nbdqcow.block.tools import ImageInfo, SnapshotInfo, parse_window
from nbdqcow.cli.img import print_help
from nbdqcow.cli.img_names import GivenObjects, ImageName
from nbdqcow.cli.img_open import OpenImage, backing_path, describe_chain
from nbdqcow.cli.img_options import (
    check_cache,
    format_json,
    parse_arguments,
    print_tree,
    wants_json,
)
from nbdqcow.cli.messages import error
from nbdqcow.errors import ImageError, UsageError
from nbdqcow.units import SECTOR_SIZE, format_size

_LONG: Final = {
    "help": "-h",
    "format=": "-f",
    "output=": "--output",
    "backing-chain": "--backing-chain",
    "object=": "--object",
    "image-opts": "--image-opts",
    "force-share": "-U",
    "cache=": "-t",
    "limits": "--limits",
}
_FILE_S_FORMATS: Final = frozenset(("raw", "luks"))
"""Those of which QEMU tells no more than of the file; of an export that is nothing."""
_MAX_BUFFERS: Final = 1024
"""Of one request, as Linux takes them (IOV_MAX)."""


def run(arguments: Sequence[str]) -> int:
    """Run the command; return its exit status."""
    options, operands = parse_arguments(arguments, ":hf:t:U", _LONG)
    format_, output, cache = None, "human", "writeback"
    whole_chain = force_share = image_opts = limits = False
    objects = GivenObjects()
    for name, value in options:
        match name:
            case "-h":
                print_help()
                return 0
            case "-f":
                format_ = value
            case "-U":
                force_share = True
            case "-t":
                cache = value
            case "--limits":
                limits = True
            case "--output":
                output = value
            case "--backing-chain":
                whole_chain = True
            case "--image-opts":
                image_opts = True
            case _:
                objects.add(value)
    if len(operands) != 1:
        raise UsageError("Expecting one image file name")
    json = wants_json(output)
    cache = check_cache(cache, "Invalid cache option: ")
    named = objects.image_name(
        operands[0], format_, image_opts=image_opts, force_share=force_share
    )
    shown = _describe(
        named, whole_chain=whole_chain, limits_with=cache if limits else None
    )
    if json:
        described = [values for _, values in shown]
        print(format_json(described if whole_chain else described[0]))
        return 0
    for index, (info, values) in enumerate(shown):
        if index:
            print()
        _print_human(info, values)
    return 0


def _describe(
    named: ImageName, *, whole_chain: bool, limits_with: str | None
) -> list[tuple[ImageInfo, dict[str, Any]]]:
    """Return what an image, and with ``whole_chain`` each one below it, is, and what
    json shows of it. ``limits_with``: the cache mode whose limits are shown, too.

    Raises `ImageError`.
    """
    for key, value in named.pairs.items():
        if key.startswith("backing.") or (key == "backing" and value):
            # It is not opened.
            format_ = named.format or "raw"
            raise ImageError(
                f"Could not open '{named.text}': Block format '{format_}' does not "
                f"support the option '{key}'"
            )
    described: list[tuple[ImageInfo, dict[str, Any]]] = []
    for image, info in describe_chain(named, whole_chain=whole_chain):
        for text in info.warnings:
            error(f"warning: {text}")
        if not described and info.format == "raw":
            try:
                _, info.virtual_size = parse_window(named.pairs, info.virtual_size)
            except ImageError as exc:
                raise ImageError(f"Could not open '{named.text}': {exc}") from None
        values = _as_json(image, info)
        if limits_with is not None:
            guessed = info.format == "raw" and named.format is None
            values = {"limits": _limits(info, limits_with, guessed=guessed)} | values
        if not described:
            if json_name := named.as_json(info.format):
                values["filename"] = json_name
            values["format"] = named.shown_format(info.format)
        described.append((info, values))
    return described


def _limits(info: ImageInfo, cache: str, *, guessed: bool) -> dict[str, int]:
    """Return what requests are best aligned to, in bytes, as QEMU has it for the
    image. What it only guesses to be raw it writes whole sectors of."""
    values: dict[str, int] = {}
    by_sectors = info.format == "qcow" or info.encrypted or guessed
    if info.format == "qcow2":
        assert info.cluster_size is not None
        extended = (info.specific or {}).get("extended-l2", False)
        values["write-zeroes-alignment"] = info.cluster_size // (32 if extended else 1)
    values["request-alignment"] = SECTOR_SIZE if by_sectors else 1
    values["min-mem-alignment"] = SECTOR_SIZE if cache in ("none", "directsync") else 1
    if info.format == "qcow2":
        assert info.cluster_size is not None
        values["discard-alignment"] = info.cluster_size
    values["opt-mem-alignment"] = mmap.PAGESIZE
    values["max-iov"] = _MAX_BUFFERS
    return values


def _as_json(image: OpenImage, info: ImageInfo) -> dict[str, Any]:
    """Return what json shows, in qemu-img's order."""
    values: dict[str, Any] = {}
    if info.backing_format is not None and info.backing_filename is not None:
        values["backing-filename-format"] = info.backing_format
    if info.snapshots:
        values["snapshots"] = [_snapshot_as_json(one) for one in info.snapshots]
    values["virtual-size"] = info.virtual_size
    values["filename"] = shown_name(image.filename, info.format)
    if info.cluster_size is not None:
        values["cluster-size"] = info.cluster_size
    values["format"] = info.format
    if (allocated := image.file.allocated_length()) >= 0:
        values["actual-size"] = allocated
    if info.specific is not None:
        values["format-specific"] = {"type": info.format, "data": info.specific}
    if info.backing_filename is not None:
        values["full-backing-filename"] = backing_path(
            image.filename, info.backing_filename
        )
    if info.encrypted:
        values["encrypted"] = True
    if info.backing_filename is not None:
        values["backing-filename"] = info.backing_filename
    if info.format not in _FILE_S_FORMATS or not is_remote(innermost(image.filename)):
        values["dirty-flag"] = info.dirty
    return values


def _snapshot_as_json(snapshot: SnapshotInfo) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if snapshot.icount is not None:
        values["icount"] = snapshot.icount
    seconds, nanoseconds = divmod(snapshot.vm_clock_nanoseconds, 1_000_000_000)
    values["vm-clock-nsec"] = nanoseconds
    values["name"] = snapshot.name
    values["date-sec"] = snapshot.date_seconds
    values["date-nsec"] = snapshot.date_nanoseconds
    values["vm-clock-sec"] = seconds
    values["id"] = snapshot.id
    values["vm-state-size"] = snapshot.vm_state_length
    return values


def _print_human(info: ImageInfo, values: dict[str, Any]) -> None:
    size = info.virtual_size
    print(f"image: {values['filename']}")
    print(f"file format: {values['format']}")
    print(f"virtual size: {format_size(size)} ({size} bytes)")
    allocated = values.get("actual-size")
    text = "unavailable" if allocated is None else format_size(allocated)
    print(f"disk size: {text}")
    if info.encrypted:
        print("encrypted: yes")
    if info.cluster_size is not None:
        print(f"cluster_size: {info.cluster_size}")
    if info.dirty:
        print("cleanly shut down: no")
    if info.backing_filename is not None:
        full = values["full-backing-filename"]
        actual = f" (actual path: {full})" if full != info.backing_filename else ""
        print(f"backing file: {info.backing_filename}{actual}")
        if info.backing_format is not None:
            print(f"backing file format: {info.backing_format}")
    if "limits" in values:
        print("Block limits:")
        print_tree(values["limits"], 1)
    if info.snapshots:
        print_snapshots(info.snapshots)
    if info.specific is not None:
        print("Format specific information:")
        print_tree(info.specific, 1)


def print_snapshots(snapshots: Sequence[SnapshotInfo]) -> None:
    """Print a table of snapshots as qemu-img does."""
    print("Snapshot list:")
    _print_snapshot("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    for snapshot in snapshots:
        _print_snapshot(*_snapshot_columns(snapshot))


def _print_snapshot(
    id_: str, tag: str, vm_size: str, date: str, clock: str, icount: str
) -> None:
    # As wide as C counts, which is in bytes.
    id_, tag = (
        text + " " * (width - len(text.encode("utf-8", "surrogateescape")))
        for text, width in ((id_, 9), (tag, 16))
    )
    print(f"{id_} {tag} {vm_size:>8}{date:>20}{clock:>13}{icount:>11}")


def _snapshot_columns(snapshot: SnapshotInfo) -> tuple[str, str, str, str, str, str]:
    seconds, nanoseconds = divmod(snapshot.vm_clock_nanoseconds, 1_000_000_000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return (
        snapshot.id,
        snapshot.name,
        format_size(snapshot.vm_state_length),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.date_seconds)),
        f"{hours:02}:{minutes:02}:{seconds:02}.{nanoseconds // 1_000_000:03}",
        "" if snapshot.icount is None else str(snapshot.icount),
    )
