"""Images on NBD servers."""
