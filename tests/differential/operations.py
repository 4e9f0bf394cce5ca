"""Random operations, aimed at the places where image formats go wrong."""

import enum
import random
from dataclasses import dataclass

KiB = 1 << 10


class Kind(enum.Enum):
    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    TRIM = "trim"
    FLUSH = "flush"
    CACHE = "cache"


@dataclass(frozen=True, slots=True)
class Operation:
    """One request, free of any wire: a node or a client can run it."""

    kind: Kind
    offset: int = 0
    length: int = 0
    data: bytes = b""
    fua: bool = False
    may_unmap: bool = True
    fast_only: bool = False

    def __str__(self) -> str:
        flags = [
            name
            for name, on in (
                ("fua", self.fua),
                ("no_hole", not self.may_unmap),
                ("fast", self.fast_only),
            )
            if on
        ]
        words = [self.kind.value, f"{self.offset:#x}+{self.length:#x}", *flags]
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Weights:
    """How often each kind comes up, relative to the others."""

    read: int = 36
    write: int = 36
    zero: int = 10
    trim: int = 10
    flush: int = 4
    cache: int = 4

    def draw(self, source: random.Random) -> Kind:
        weights = (
            self.read,
            self.write,
            self.zero,
            self.trim,
            self.flush,
            self.cache,
        )
        return source.choices(tuple(Kind), weights)[0]


class Generator:
    """Draws operations for a disk of ``size`` bytes in clusters.

    Half of all operations fall into a few hot places, so that they meet one
    another: the end of the disk, and the surroundings of some clusters.
    """

    def __init__(
        self,
        source: random.Random,
        size: int,
        cluster_size: int,
        weights: Weights | None = None,
        *,
        maximum_length: int = 256 * KiB,
    ) -> None:
        self._source = source
        self._size = size
        self._cluster_size = cluster_size
        self._weights = weights or Weights()
        self._maximum_length = maximum_length
        self._hot = [source.randrange(size) for _ in range(6)] + [size - 1, 0]

    def next(self) -> Operation:
        """Draw one operation."""
        source = self._source
        kind = self._weights.draw(source)
        if kind is Kind.FLUSH:
            return Operation(kind)
        offset, length = self._range()
        if kind is Kind.WRITE:
            # Some all-zero payloads: the server may look for them.
            data = bytes(length) if source.random() < 0.03 else source.randbytes(length)
            return Operation(
                kind, offset, length, data=data, fua=source.random() < 0.02
            )
        if kind is Kind.ZERO:
            return Operation(
                kind,
                offset,
                length,
                fua=source.random() < 0.02,
                may_unmap=source.random() < 0.6,
                fast_only=source.random() < 0.1,
            )
        return Operation(kind, offset, length)

    def _range(self) -> tuple[int, int]:
        source = self._source
        size, cluster_size = self._size, self._cluster_size
        shape = source.random()
        if shape < 0.30:  # a few bytes or sectors, anywhere
            length = source.randint(1, 3000)
        elif shape < 0.50:  # sectors
            length = 512 * source.randint(1, 16)
        elif shape < 0.70:  # whole clusters
            length = cluster_size * source.randint(1, 4)
        elif shape < 0.85:  # about a cluster, but not quite
            length = max(1, cluster_size + source.randint(-513, 513))
        else:
            length = source.randint(1, self._maximum_length)
        length = min(length, self._maximum_length, size)
        if source.random() < 0.5:
            offset = source.choice(self._hot) + source.randint(
                -2 * cluster_size, cluster_size
            )
        else:
            offset = source.randrange(size)
        alignment = source.choices((1, 512, 4096, cluster_size), (3, 3, 2, 3))[0]
        offset = min(max(offset, 0), size - 1) // alignment * alignment
        return offset, min(length, size - offset)
