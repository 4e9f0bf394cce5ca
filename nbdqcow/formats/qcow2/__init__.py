"""The qcow2 driver, one module for each concern of the format."""
