"""Blocking work beside the event loop."""

import asyncio

run_blocking = asyncio.to_thread
