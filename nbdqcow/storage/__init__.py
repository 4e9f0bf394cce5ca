"""Storage drivers: where the bytes of images live."""
