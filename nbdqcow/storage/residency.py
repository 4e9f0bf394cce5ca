"""Which pages of a mapped file are in page cache."""

import ctypes

from nbdqcow.storage.linux import PAGE_SIZE, mincore


class Residency:
    """Asks mincore(2) about ranges of at most ``max_length`` bytes."""

    def __init__(self, max_length: int) -> None:
        # One byte a page, written by mincore(2).
        self._pages = bytearray(max_length // PAGE_SIZE + 1)
        self._pages_address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))

    def is_resident(self, address: int, length: int) -> bool:
        """Whether all pages of a mapped range are in page cache."""
        in_page = address % PAGE_SIZE
        if mincore(address - in_page, in_page + length, self._pages_address):
            return False
        nb_pages = (in_page + length + PAGE_SIZE - 1) // PAGE_SIZE
        return self._pages.find(0, 0, nb_pages) < 0
