"""What a comm keeps alive."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import weakref
from typing import Any

import numpy as np
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import to_serialize

from dask_shm_bridge import pool

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
