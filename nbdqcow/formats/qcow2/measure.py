"""How much room an image would take: qemu-img's ``measure``."""

from collections.abc import Mapping, Sequence
from typing import Final

from nbdqcow.block.tools import Measure, OptionValue
from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.create import CreateOptions, refcount_structures
from nbdqcow.formats.qcow2.entries import MAX_L1_BYTES
from nbdqcow.units import round_up

_DIRECTORY_ENTRY: Final = 24
"""Bytes of a bitmap's directory entry without its name."""


def measure(
    options: CreateOptions,
    values: Mapping[str, OptionValue],
    data_length: int,
    bitmaps: Sequence[tuple[str, int]] | None,
) -> Measure:
    """See `FormatTool.measure`; ``options`` is what ``values`` say.

    Raises `ImageError`.
    """
    _check(options)
    size = round_up(options.size, options.cluster_size)
    luks_length = 0
    if values.get("encrypt.format") == "luks":
        luks_length = round_up(_luks_length(values), options.cluster_size)
    whole = _whole_length(options, size) + luks_length
    if options.preallocation in ("falloc", "full"):
        data_length = size
    bitmaps_length = None
    if bitmaps is not None and options.version >= 3:
        bitmaps_length = _bitmaps_length(options.cluster_size, options.size, bitmaps)
    return Measure(whole - size + min(data_length, size), whole, bitmaps_length)


def _check(options: CreateOptions) -> None:
    """Refuse the little that QEMU does here."""
    if options.version < 3 and options.refcount_bits != 16:
        raise ImageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or"
            " above (use compat=1.1 or greater)"
        )
    CreateOptions(
        size=options.size,
        cluster_size=options.cluster_size,
        refcount_bits=options.refcount_bits,
        extended_l2=options.extended_l2,
    ).check()


def _luks_length(values: Mapping[str, OptionValue]) -> int:
    from nbdqcow.crypto.luks import new_area_length
    from nbdqcow.formats.luks_options import parse_cipher

    if values.get("encrypt.key-secret") is None:
        raise ImageError("Parameter 'encrypt.key-secret' is required for cipher")
    spec, _ = parse_cipher(values, "encrypt.")
    return new_area_length(spec.key_length)


def _whole_length(options: CreateOptions, size: int) -> int:
    """Return the bytes of a file with all of the disk's clusters and tables."""
    cluster_size = options.cluster_size
    entry_length = 16 if options.extended_l2 else 8
    data_clusters = -(-size // cluster_size)
    l2_length = round_up(data_clusters * entry_length, cluster_size)
    l1_length = round_up(l2_length // cluster_size * 8, cluster_size)
    if l2_length // cluster_size * 8 > MAX_L1_BYTES:
        raise ImageError(
            "The image size is too large (try using a larger cluster size)"
        )
    other = cluster_size + l2_length + l1_length
    nb_clusters = data_clusters + other // cluster_size
    nb_tables, nb_blocks = refcount_structures(
        nb_clusters, cluster_size, options.refcount_bits
    )
    return (nb_clusters + nb_tables + nb_blocks) * cluster_size


def _bitmaps_length(
    cluster_size: int, size: int, bitmaps: Sequence[tuple[str, int]]
) -> int:
    length = directory_length = 0
    for name, granularity in bitmaps:
        nb_bytes = -(-size // (granularity * 8))
        nb_clusters = -(-nb_bytes // cluster_size)
        length += nb_clusters * cluster_size + round_up(nb_clusters * 8, cluster_size)
        name_length = len(name.encode("utf-8", "surrogateescape"))
        directory_length += round_up(_DIRECTORY_ENTRY + name_length, 8)
    return length + round_up(directory_length, cluster_size)
