"""What a comm keeps alive."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import threading
import time
import weakref
from typing import Any

import dask
import numpy as np
import pytest
from distributed.comm import CommClosedError, connect, listen
from distributed.protocol import Serialize, to_serialize

from dask_shm_bridge import backends, counters, store
from dask_shm_bridge.errors import LedgerBusyError

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
        joined = store.attached()
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
    joined = store.attached()
    assert joined is not None
    joined.settle()
    counts = joined.ledger.usage()["counts"]
    assert (counts["extent"], counts["lease"], counts["ticket"]) == (0, 0, 0), counts


def test_what_was_sent_is_read_though_its_sender_closed_and_the_ledger_is_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def talk() -> Any:
        sent = asyncio.Event()
        got: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        closed: list[bool] = []

        async def serve(comm: Any) -> None:
            await sent.wait()
            joined = store.attached()
            assert joined is not None
            receive, stream = joined.receive, comm.stream

            def held(*args: Any) -> Any:
                if len(closed) >= 3:
                    return receive(*args)
                if threading.current_thread() is not threading.main_thread():
                    time.sleep(0.1)  # a process that is stopped holds the ledger
                closed.append(stream.closed())
                raise LedgerBusyError("busy")

            monkeypatch.setattr(joined, "receive", held)
            try:
                got.set_result(await comm.read())
            except BaseException as error:
                got.set_exception(error)
            monkeypatch.undo()
            comm.abort()

        listener = await listen("shm://127.0.0.1:0", serve)
        comm = await connect(listener.contact_address)
        await comm.write([to_serialize(np.full(MiB, 7, "u1"))])
        await comm.close()
        sent.set()
        (x,) = await asyncio.wait_for(got, 30)
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping
        assert closed[-1]
        return x

    x = asyncio.run(talk())
    assert (np.asarray(x) == 7).all()


def test_a_connect_that_is_out_of_time_closes_its_socket(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # a listener makes a row for the peer, and would keep it until its handshake times out
    async def slow(comm: Any) -> None:
        await asyncio.sleep(60)

    async def talk() -> bytes:
        ended: asyncio.Queue[bytes] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            data = await reader.read()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            await ended.put(data)

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


SMALL = {
    "a number": 1,
    "text": ["", "a", "ä" * 100],
    "bytes": [b"", b"x", bytes(100)],
    "arrays": [to_serialize(np.arange(n, dtype="u1")) for n in (0, 1, 2, 65_535, 65_536, 65_537)],
    "no dimension": to_serialize(np.array(1.5)),
    "nested": {"op": "x", "deep": [{"a": to_serialize({"b": np.ones(3)})}, to_serialize("text")]},
    "many": [to_serialize(np.full(1, n)) for n in range(100)],
}


@pytest.mark.parametrize("name", SMALL)
def test_a_threshold_of_one_byte(name: str) -> None:
    # the first frame too, which says what the message is; only the manifest is on the socket
    async def serve(comm: Any) -> None:
        with contextlib.suppress(CommClosedError):
            while True:
                message = await comm.read()
                await comm.write([to_serialize(x) if stored(x) else x for x in message])

    def stored(x: Any) -> bool:
        return isinstance(x, np.ndarray)

    async def talk() -> tuple[Any, dict[str, Any], dict[str, Any]]:
        listener = await listen("shm://127.0.0.1:0", serve)
        comm = await connect(listener.contact_address)
        before = counters.snapshot()
        value = SMALL[name]
        message = value if isinstance(value, list) else [value]
        await comm.write(message)
        received = await comm.read()
        after = counters.snapshot()
        await comm.close()
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping
        return received, before, after

    with dask.config.set({"shm-bridge.threshold": 1}):
        received, before, after = asyncio.run(talk())
    sent = SMALL[name] if isinstance(SMALL[name], list) else [SMALL[name]]
    assert len(received) == len(sent)
    np.testing.assert_equal(received, [plain(x) for x in sent])
    assert after["fallbacks"] == before["fallbacks"]

    def moved(direction: str, way: str, what: str) -> int:
        return int(after[what][direction][way] - before[what][direction][way])

    assert moved("sent", "inline", "bytes") < 40 * len(sent) + 2_000
    through = moved("received", "viewed", "frames")
    assert through == moved("sent", "copied", "frames") + moved("sent", "referenced", "frames")
    assert through >= 2, "the first frame of each message"


def plain(x: Any) -> Any:
    """Return what arrives where `x` was sent."""
    if isinstance(x, Serialize):
        return plain(x.data)
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return [plain(one) for one in x] if isinstance(x, list) else x
