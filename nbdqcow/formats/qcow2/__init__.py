"""The qcow2 driver, one module for each concern of the format.

Where a change goes:

- What bytes mean, for the driver and the tools alike: ``header``, ``entries``,
  ``refcount_codec``, ``snapshot_table``, ``bitmap_directory``, ``encryption_header``.
- The life of an open image: ``opening``, ``settings``, ``repair``, ``driver``,
  ``reopen``; what else one can do with it is listed in ``operations``.
- Where guest bytes are: ``mapping``, over the cached tables of ``tables``; of many
  clusters at once ``extents`` and ``runs``; in compressed clusters ``compress``, whose
  streams are ``codec``'s, those of deflate made by ``deflater``.
- Guest writes: ``write``, ``write_inline``, ``discard``, ``compressed_write``, and
  ``overlap``, which stops those that would hit metadata.
- With subclusters another module takes the place of one: its name ends in
  ``_extended``.
- Space, and the order in which metadata reaches the disk: ``refcount`` over
  ``refcount_blocks``, ``writeback``.
- Changes of a whole image: ``resize``, ``snapshot`` (where there is no room for one's
  deletion ``snapshot_release``), ``amend`` with ``expand_zeroes`` and
  ``refcount_width``. New metadata beside the old is a ``generation`` (with
  ``new_counts``); ``header_update`` changes the header alone.
- Guest data in another file, or encrypted: ``data_file``, ``encryption``. Which of it
  was written: ``bitmap``, ``memory_bitmap``.
- The check: ``check`` runs it, ``references`` and ``l2_references`` count, ``copied``
  and ``snapshot_check`` look at the rest, ``rebuild`` makes refcounts anew.
- What commands ask: ``tool``; of new images ``create``, ``create_values``, ``measure``.
"""
