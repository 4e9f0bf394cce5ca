"""Format drivers: they map guest offsets to places in a storage driver."""
