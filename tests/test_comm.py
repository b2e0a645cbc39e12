"""What a comm keeps alive."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import weakref
from typing import Any

import numpy as np
import pytest
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize

from dask_shm_bridge import backends, pool

MiB = 1024 * 1024


def test_a_write_to_a_broken_connection_keeps_nothing_alive() -> None:
    # tornado keeps the error with its traceback, and Dask's finalizer keeps the stream
    async def serve(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            while True:
                await comm.write([to_serialize(x) for x in await comm.read()])

    async def talk() -> weakref.ref[Any]:
        listener = await listen("shm://127.0.0.1:0", serve)
        comm = await connect(listener.contact_address)
        await comm.write([to_serialize(np.ones(MiB, "u1"))])
        (x,) = await comm.read()
        joined = pool.attached()
        assert joined is not None and len(joined.views) >= 1, "x came through the pool"
        stream = comm.stream
        stream.socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(CommClosedError):
            await comm.write([to_serialize(x), to_serialize(x.copy())])
        assert isinstance(stream.error, BrokenPipeError)
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping
        return weakref.ref(comm)

    ended = asyncio.run(talk())
    gc.collect()
    assert ended() is None
    joined = pool.attached()
    assert joined is not None
    joined.settle()
    counts = joined.ledger.usage()["counts"]
    assert (counts["extent"], counts["lease"], counts["ticket"]) == (0, 0, 0), counts


def test_a_connect_that_is_out_of_time_closes_its_socket(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # a listener makes a row for the peer, and would keep it until its handshake times out
    async def slow(comm: Any) -> None:
        await asyncio.sleep(60)

    async def talk() -> bytes:
        ended: asyncio.Queue[bytes] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await ended.put(await reader.read())
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(OSError, match="Timed out"):
            await connect(f"shm://127.0.0.1:{port}", timeout=0.2)
        found = await asyncio.wait_for(ended.get(), 10)
        server.close()
        return found

    monkeypatch.setattr(backends, "join_pool", slow)
    assert asyncio.run(talk()) == b""
    assert "dangling" not in caplog.text
