"""qcow2 metadata, module by module."""
