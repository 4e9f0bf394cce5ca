"""The asyncio shells around the NBD protocol."""
