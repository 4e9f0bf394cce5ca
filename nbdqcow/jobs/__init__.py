"""Long work on images, with progress, pause and cancel."""
