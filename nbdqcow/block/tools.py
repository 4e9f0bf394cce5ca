"""The contract of image tools: what commands ask of a format besides I/O.

A tool describes, creates and checks images of one format. It works without an
event loop on a `BlockingFile`, so that a command starts fast; the registry
(`nbdqcow.block.registry.format_tool`) loads it by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

from nbdqcow.block.steps import BlockingFile
from nbdqcow.errors import ImageError, NotSupported
from nbdqcow.units import parse_size, size_expected

REPAIR_NONE: Final = 0
REPAIR_LEAKS: Final = 1
"""Only what loses nothing: refcounts go down, COPIED flags become right."""
REPAIR_ALL: Final = 2
"""Also what could choose wrong: refcounts go up or are built anew."""

Report: TypeAlias = Callable[[str], None]
"""Takes one line about something found or repaired."""

OptionValue: TypeAlias = str | int | bool

Secrets: TypeAlias = Callable[[str], bytes]
"""Returns the passphrase that an option names by its id; raises `ImageError`
if there is none."""

Progress: TypeAlias = Callable[[int, int], None]
"""Takes how much is done, and of how much, in one measure."""


CACHE_MODES: Final = ("writeback", "none", "writethrough", "unsafe", "directsync")
"""What an image can be opened with, in QEMU's words."""

PREALLOCATIONS: Final = ("off", "metadata", "falloc", "full")
"""How much of an image's room is taken at once: none; the tables, so that all
is mapped; the file's space as well; the same by writing zeroes."""

BACKING_FORMATS: Final = (
    *("raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "luks", "parallels"),
    *("bochs", "cloop", "dmg", "vvfat", "file", "host_device", "host_cdrom", "nbd"),
    *("http", "https", "ftp", "ftps", "ssh", "rbd", "iscsi", "nfs", "gluster", "nvme"),
    *("null-co", "null-aio", "quorum", "throttle", "replication", "compress"),
    *("preallocate", "copy-on-read", "copy-before-write", "snapshot-access"),
    *("blkdebug", "blkverify", "blklogwrites", "blkreplay"),
)
"""What an image may call its backing file's format: all that QEMU 7.2 knows, for which
the image may be meant."""


def no_secrets(name: str) -> bytes:
    """Be the `Secrets` of a command line that has none. Raises `ImageError`."""
    raise ImageError(f"No secret with id '{name}'")


class OptionSpec(NamedTuple):
    """One ``-o`` option of a format: its kind is ``str``, ``size``, ``num`` or
    ``bool``; ``default`` is shown when the option is not given."""

    name: str
    kind: str
    help: str
    default: str | None = None


class SnapshotInfo(NamedTuple):
    """An internal snapshot; ``icount`` is None where it was not recorded."""

    id: str
    name: str
    vm_state_length: int
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    icount: int | None


@dataclass(slots=True)
class ImageInfo:
    """What ``info`` shows of one image file; sizes in bytes.

    Attributes:
        data_filename: the external data file that the image needs, "" if it
            names none; None if its data is in itself.
        specific: what only this format has, by QEMU's json names, nested.
        warnings: lines to show before the rest.
    """

    format: str
    virtual_size: int
    cluster_size: int | None = None
    encrypted: bool = False
    dirty: bool = False
    backing_filename: str | None = None
    backing_format: str | None = None
    data_filename: str | None = None
    snapshots: Sequence[SnapshotInfo] = ()
    specific: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()


@dataclass(slots=True)
class CheckResult:
    """What a consistency check found; clusters are counted, not bytes.

    ``corruptions`` and ``leaks`` are what is still wrong, ``check_errors``
    what could not be checked.
    """

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0


class Measure(NamedTuple):
    """The room that a new image would need, in bytes.

    Attributes:
        required: for the data that there is.
        fully_allocated: once all of the disk was written.
        bitmaps: more for the source's bitmaps; None if there can be none.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


class FormatTool(ABC):
    """What the commands need of one format."""

    name: ClassVar[str]
    create_options: ClassVar[Sequence[OptionSpec]]
    key_options: ClassVar[Sequence[OptionSpec]] = ()
    supports_backing: ClassVar[bool] = False
    supports_check: ClassVar[bool] = False

    @abstractmethod
    def describe(self, file: BlockingFile) -> ImageInfo:
        """Describe an image. Raises `ImageError` and `OSError`."""

    @abstractmethod
    def prepare(
        self, values: Mapping[str, OptionValue], *, secrets: Secrets = no_secrets
    ) -> Any:
        """Plan a new image from its ``-o`` options (by name, ``size`` among
        them). Raises `ImageError` before any file is touched."""

    @abstractmethod
    def create(self, file: BlockingFile, plan: Any) -> None:
        """Write the image that `prepare` planned. Raises `OSError`."""

    def data_file_name(self, plan: Any) -> str | None:
        """Return the name that the planned image has for its external data
        file; None if it has none."""
        return None

    def create_data_file(self, file: BlockingFile, plan: Any) -> None:
        """Make a file the external data file of the planned image. Raises
        `OSError`."""
        raise AssertionError("this format has no external data files")

    def measure(
        self,
        values: Mapping[str, OptionValue],
        data_length: int = 0,
        bitmaps: Sequence[tuple[str, int]] | None = None,
    ) -> Measure:
        """Say how much room the image that ``values`` describe would need.

        ``data_length`` is how many bytes of the source are not zero, counted
        in whole clusters of the new image; all of them if it is to have a
        backing file. ``bitmaps`` are names and granularities of those of the
        source, None if it is of a format without. Raises `ImageError`,
        `NotSupported` if the format can't tell.
        """
        raise NotSupported(
            f"Block driver '{self.name}' does not support size measurement"
        )

    def describe_for_check(self, file: BlockingFile) -> ImageInfo:
        """Describe an image as far as a check needs it, which finds errors that
        `describe` refuses."""
        return self.describe(file)

    def check_secret(self, file: BlockingFile, passphrase: bytes) -> None:
        """Raise `ImageError` if the image is encrypted and the passphrase does
        not open it."""

    def check(self, file: BlockingFile, repair: int, report: Report) -> CheckResult:
        """Check an image and repair it as far as ``repair`` allows.

        Every finding is reported in a line. Raises `ImageError` for what is no
        image at all, `NotSupported` if the format knows no checks.
        """
        raise NotSupported("This image format does not support checks")


def parse_window(options: Mapping[str, Any], length: int) -> tuple[int, int]:
    """Return the ``offset`` and the ``size`` of the part of a file of ``length``
    bytes that is a raw disk. Raises `ImageError` if it is not within the file."""
    offset = _parse_bytes(options, "offset", 0)
    if offset > length:
        raise ImageError(
            f"Offset ({offset}) cannot be greater than size of the containing"
            f" file ({length})"
        )
    size = _parse_bytes(options, "size", length - offset)
    if offset + size > length:
        raise ImageError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or"
            f" equal to the  actual size of the containing file ({length})"
        )
    return offset, size


def _parse_bytes(options: Mapping[str, Any], name: str, default: int) -> int:
    """Return an option that is a number of bytes, or text as people write it."""
    value = options.get(name)
    if value is None:
        return default
    if isinstance(value, str):
        try:
            value = parse_size(value, limit=1 << 64)
        except ValueError:
            raise ImageError(size_expected(name)) from None
    if not isinstance(value, int) or value < 0:
        raise ImageError(size_expected(name))
    return value
