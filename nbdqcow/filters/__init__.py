"""Storage drivers over a storage driver, for tests of what is above them."""
