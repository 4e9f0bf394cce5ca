"""Storage drivers: where the bytes of images live.

``file`` is the driver of local files, over ``inline_file`` (what it does in the turn
of the loop), ``holes``, and ``mapped``, ``overwrite`` and ``residency`` (page cache
without copies); ``direct`` is the one past page cache. Opening is ``open_file``,
``opening`` and ``reopening``, with the image locks of ``locks``; ``blocking`` is a file
for commands that have no event loop. ``memory`` and ``null`` have no file, ``nbd`` is
an NBD server.
"""
