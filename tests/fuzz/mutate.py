"""Changes to input that make it almost right."""

import random
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
_NUMBERS = (0, 1, 2, 7, 8, 127, 255, 256, 511, 512, 4096, 65535, 65536)
_NUMBERS += ((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 56) - 1)
_NUMBERS += (1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
MAX_LENGTH = 1 << 17


def load(target: str) -> list[bytes]:
    """Return the corpus of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]


def mutate(data: bytes, corpus: list[bytes], rnd: random.Random) -> bytes:
    """Return ``data`` with one to eight changes."""
    changed = bytearray(data)
    for _ in range(rnd.choice((1, 1, 2, 3, 8))):
        # What comes first decides most.
        limit = rnd.choice((len(changed), min(len(changed), 200)))
        at = rnd.randrange(limit + 1)
        match rnd.randrange(8):
            case 0:
                changed[at : at + 1] = rnd.randbytes(1)
            case 1 if at < len(changed):
                changed[at] ^= 1 << rnd.randrange(8)
            case 2 | 3:
                width = rnd.choice((1, 2, 4, 8))
                at -= at % width
                number = rnd.choice(_NUMBERS) + rnd.choice((0, 0, 0, -1, 1))
                raw = (number % (1 << (8 * width))).to_bytes(width, "big")
                changed[at : at + width] = raw
            case 4:
                del changed[at : at + rnd.choice((1, 4, 8, 100, 1 << 20))]
            case 5:
                other = rnd.choice(corpus)
                start = rnd.randrange(len(other) + 1)
                piece = other[start : start + rnd.choice((1, 8, 64, 4096))]
                changed[at : at + len(piece) * rnd.randrange(2)] = piece
            case 6:
                width = rnd.choice((8, 8, 512))
                start = rnd.randrange(len(changed) + 1) // width * width
                at -= at % width
                changed[at : at + width] = changed[start : start + width]
            case _:
                changed[at:at] = rnd.randbytes(rnd.choice((1, 8, 600)))
    return bytes(changed[:MAX_LENGTH])
