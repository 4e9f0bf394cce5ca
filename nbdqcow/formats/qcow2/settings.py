"""How an image is opened: what the options mean, with QEMU's defaults."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

from nbdqcow.errors import ImageError
from nbdqcow.formats.qcow2.header import Header
from nbdqcow.units import MiB

DEFAULT_L2_CACHE: Final = 32 * MiB
"""Bytes of L2 slices kept by default, as QEMU has it: enough for 256 GiB with
clusters of 64 KiB."""
_DEFAULT_REFCOUNT_CACHE: Final = 4 * MiB
_MIN_REFCOUNT_BLOCKS: Final = 4

_CONSTANT: Final = frozenset(
    ("main-header", "active-l1", "refcount-table", "snapshot-table", "bitmap-directory")
)
_CACHED: Final = _CONSTANT | {"active-l2", "refcount-block", "inactive-l1"}
_TEMPLATES: Final = {
    "none": frozenset[str](),
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": _CACHED | {"inactive-l2"},
}


class Settings(NamedTuple):
    """The options of `Qcow2Driver.open` that are about caches and behaviour.

    Attributes:
        l2_cache_bytes, refcount_cache_bytes: memory for tables.
        compressed_cache_bytes: memory for decompressed clusters; None for a share
            of what all images have.
        clean_interval: seconds after which a cached table that was not used
            is dropped; 0 for never.
        lazy_refcounts: refcounts may wait until the image is closed.
        discard_request, discard_snapshot, discard_other: give space back to
            the file system that a guest's discard, the removal of a snapshot,
            anything else has freed.
        keep_discarded: a discarded cluster stays the guest's, as a zero one.
        explicit_zeroes: what is to read as zeroes gets a zero cluster also where
            nothing is stored and no backing file shows through.
        overlap_checks: kinds of metadata that no data may be written over.
    """

    l2_cache_bytes: int = DEFAULT_L2_CACHE
    refcount_cache_bytes: int = _DEFAULT_REFCOUNT_CACHE
    compressed_cache_bytes: int | None = None
    clean_interval: int = 0
    lazy_refcounts: bool = False
    discard_request: bool = True
    discard_snapshot: bool = True
    discard_other: bool = False
    keep_discarded: bool = False
    explicit_zeroes: bool = False
    overlap_checks: frozenset[str] = _CACHED

    @classmethod
    def parse(cls, options: Mapping[str, Any], header: Header) -> Self:
        """Raises `ImageError`, in QEMU's words where it refuses the same."""
        l2_cache, refcount_cache = _cache_sizes(options, header)
        lazy = options.get("lazy_refcounts")
        if lazy and header.version < 3:
            raise ImageError(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1"
                " compatibility level"
            )
        keep = bool(options.get("discard_no_unref", False))
        if keep and header.version < 3:
            raise ImageError("discard-no-unref is only supported since qcow2 version 3")
        request = options.get("pass_discard_request")
        if request is None:
            request = options.get("discard", True)
        template, switches = options.get("overlap_check", ("cached", {}))
        checks = set(_TEMPLATES[template])
        for name, wanted in switches.items():
            (checks.add if wanted else checks.discard)(name)
        return cls(
            l2_cache_bytes=l2_cache,
            refcount_cache_bytes=refcount_cache,
            compressed_cache_bytes=options.get("compressed_cache_size"),
            clean_interval=options.get("cache_clean_interval", 0),
            lazy_refcounts=header.lazy_refcounts if lazy is None else lazy,
            discard_request=bool(request),
            discard_snapshot=options.get("pass_discard_snapshot", True),
            discard_other=options.get("pass_discard_other", False),
            keep_discarded=keep,
            explicit_zeroes=bool(options.get("explicit_zeroes", False)),
            overlap_checks=frozenset(checks),
        )


def _cache_sizes(options: Mapping[str, Any], header: Header) -> tuple[int, int]:
    """Return the bytes for L2 slices and for refcount blocks."""
    both = options.get("cache_size")
    l2_cache = options.get("l2_cache_size")
    refcount_cache = options.get("refcount_cache_size")
    least = _MIN_REFCOUNT_BLOCKS * header.cluster_size
    if both is None:
        return l2_cache or DEFAULT_L2_CACHE, refcount_cache or _DEFAULT_REFCOUNT_CACHE
    if l2_cache is not None and refcount_cache is not None:
        raise ImageError(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the"
            " same time"
        )
    if l2_cache is not None and l2_cache > both:
        raise ImageError("l2-cache-size may not exceed cache-size")
    if refcount_cache is not None and refcount_cache > both:
        raise ImageError("refcount-cache-size may not exceed cache-size")
    if l2_cache is not None:
        return l2_cache, both - l2_cache
    if refcount_cache is None:
        refcount_cache = min(least, both)
    return both - refcount_cache, refcount_cache
