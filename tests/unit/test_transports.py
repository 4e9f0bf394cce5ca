"""`writelines` of asyncio's sockets, whatever the version of Python."""

import asyncio
import socket

import pytest

from nbdqcow import transports
from nbdqcow.transports import mend_writelines

BUFFERS = [b"head", memoryview(b"payload"), bytearray(b"tail")]


class Writer(asyncio.Protocol):
    paused = False

    def pause_writing(self):
        self.paused = True

    def resume_writing(self):
        self.paused = False


@pytest.fixture(params=[False, True], ids=["by version", "mended"])
def mended(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(transports, "_WRITELINES_IS_BROKEN", True)


async def connect():
    ours, theirs = socket.socketpair()
    transport, writer = await asyncio.get_running_loop().create_connection(
        Writer, sock=ours
    )
    mend_writelines(transport)
    return transport, writer, theirs


@pytest.mark.asyncio
async def test_all_arrives_in_order(mended):
    transport, _, theirs = await connect()
    with theirs:
        transport.writelines(BUFFERS)
        transport.writelines([])
        transport.close()
        await asyncio.sleep(0)
        assert theirs.recv(100) == b"headpayloadtail"
        assert theirs.recv(100) == b""


@pytest.mark.asyncio
async def test_pauses_who_writes_too_much(mended):
    transport, writer, theirs = await connect()
    with theirs:
        transport.writelines([bytes(4 << 20)] * 2)
        # uvloop writes and pauses at the end of the turn.
        await asyncio.sleep(0.01)
        assert writer.paused
        assert transport.get_write_buffer_size() > 0
        transport.abort()


@pytest.mark.asyncio
async def test_a_closing_connection_takes_anything(mended):
    transport, _, theirs = await connect()
    with theirs:
        transport.writelines([bytes(4 << 20)])
        transport.close()
        transport.writelines(BUFFERS)
        transport.abort()
        transport.writelines(BUFFERS)
        await asyncio.sleep(0.01)
