"""The qcow format, version 1: the images that QEMU's driver "qcow" has."""
