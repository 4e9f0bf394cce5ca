"""The commands and what they print.

``main`` and ``serve`` are ``nbdqcow``, ``nbd`` and ``nbd_*`` are ``nbdqcow-nbd``, and
``img`` is ``nbdqcow-img``, with a module for each command:

- ``img_amend`` to ``img_snapshot`` parse one command line and show what comes of it.
- What they share: ``img_options`` (options, output), ``img_names`` (what a line says of
  an image), ``img_open`` and ``img_remote`` (without an event loop), ``img_nodes`` and
  ``img_run`` (with one), ``img_target`` (new images), ``img_streams``, ``img_chain``.
- What all programs share: ``program``, ``messages``, ``objects``, ``option_text``.

What ``img`` and its commands import at the top is start-up time: see ``late_modules``.
"""
