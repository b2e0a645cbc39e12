"""Taking a live ``tcp://`` cluster into the pool.

New connections negotiate by themselves once the negotiating backend is in the place of ``tcp``
(`install`). What is there already is upgraded here: listeners change their class, idle
connections of the RPC pool are closed, and the streams between scheduler, workers and clients,
which carry graphs and task arguments, are upgraded in place without losing a message:

1. One side makes its row in the ledger and changes its comm's class. The read that it has pending
   is still the stock one; the next will understand tickets. It tells the scheduler its row by
   a request of its own.
2. The scheduler does the same, sends an empty message over the stream, which ends that pending
   read, and may send tickets from then on. Its answer names its own row.
3. The first side sends an empty message as well, and may send tickets from then on.

Dask treats a message as a list of operations, so that an empty one does nothing. This module,
`memory` and `scheduler_plugin` are the only ones that use names of Dask which are not documented;
``tests/process/test_upgrade.py`` and ``test_placement.py`` fail where these change.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from distributed.comm import registry
from distributed.comm.tcp import TCP, TLS, TCPListener, TLSListener

from dask_shm_bridge import backends, figures, memory, wire
from dask_shm_bridge import comm as shm

logger = logging.getLogger("dask_shm_bridge")

OPERATION = "shm_bridge_upgrade"
_COMMS: dict[type, type] = {TCP: shm.ShmTCP, TLS: shm.ShmTLS}
_LISTENERS: dict[type, type] = {
    TCPListener: backends.NegotiatingListener,
    TLSListener: backends.NegotiatingTLSListener,
}
_ATTEMPTS = 20


def install() -> None:
    """Put the negotiating comm in the place of ``tcp`` and ``tls``. May be called again."""
    for scheme, backend in (
        ("tcp", backends.NegotiatingBackend),
        ("tls", backends.NegotiatingTLSBackend),
    ):
        if not isinstance(registry.backends.get(scheme), backend):
            registry.backends[scheme] = backend()
    memory.install()


def upgrade_server(server: Any) -> None:
    """Make a running worker, nanny or scheduler negotiate on all new connections."""
    if any(type(listener) in _LISTENERS for listener in server.listeners):
        install()
    for listener in server.listeners:
        listener.__class__ = _LISTENERS.get(type(listener), type(listener))
    close_idle(server.rpc)


def close_idle(rpc: Any) -> None:
    """Close connections that wait in an RPC pool and share nothing: the next request makes new.

    Also those of our own that met a peer before its upgrade.
    """
    for idle in rpc.available.values():
        for comm in list(idle):
            if _shares_nothing(comm):
                comm.abort()


def _shares_nothing(comm: Any) -> bool:
    """Say whether a comm is a stock one, or one of ours that met a stock peer."""
    return type(comm) in _COMMS or (isinstance(comm, shm.ShmTCP) and not comm.agreed)


async def upgrade_worker(worker: Any) -> bool:
    """Upgrade a worker and its stream; True if the stream uses the pool now."""
    upgrade_server(worker)
    ask = partial(getattr(worker.scheduler, OPERATION), worker=worker.address)
    return await _upgrade_stream(worker.batched_stream, ask)


async def upgrade_client(client: Any) -> bool:
    """Upgrade a client and its stream; True if the stream uses the pool now."""
    install()
    figures.add_to_client(client)
    close_idle(client.rpc)
    ask = partial(getattr(client.scheduler, OPERATION), client=client.id)
    return await _upgrade_stream(client.scheduler_comm, ask)


def upgrade_scheduler(scheduler: Any) -> None:
    """Upgrade a scheduler, and let workers and clients ask for their streams."""
    upgrade_server(scheduler)
    scheduler.handlers[OPERATION] = partial(_answer, scheduler)
    scheduler.handlers[OPERATION].__name__ = OPERATION


def upgrade_nanny(nanny: Any) -> None:
    """Make a running nanny negotiate, and leave pool pages out of its worker's memory."""
    upgrade_server(nanny)


async def _upgrade_stream(stream: Any, ask: Any) -> bool:
    comm = getattr(stream, "comm", None)
    if comm is None or not _shares_nothing(comm):
        return bool(getattr(comm, "agreed", False))
    info = await _prepare(comm)
    if info is None:
        _give_up(comm)
        return False
    answer = None
    try:
        for attempt in range(_ATTEMPTS):  # the scheduler may not have started the stream yet
            answer = await ask(info=info)
            if answer != "not yet":
                break
            await asyncio.sleep(0.05 * (attempt + 1))
    except BaseException:
        _give_up(comm)  # so that it can be tried again
        raise
    if not isinstance(answer, dict) or not comm._agree(info, answer):
        _give_up(comm)
        return False
    await _begin(comm)
    return True


async def _answer(
    scheduler: Any, info: Any = None, worker: str | None = None, client: str | None = None
) -> Any:
    """Upgrade the scheduler's end of a stream; the answer is its handshake, or a refusal."""
    stream = scheduler.stream_comms.get(worker) or scheduler.client_comms.get(client)
    comm = getattr(stream, "comm", None)
    if comm is None:
        return "not yet"
    if not _shares_nothing(comm):
        return "no"
    ours = await _prepare(comm)
    if ours is None or not comm._agree(ours, info):
        _give_up(comm)
        return "no"
    await _begin(comm)
    close_idle(scheduler.rpc)
    return ours


async def _prepare(comm: Any) -> dict[str, Any] | None:
    """Let a stock comm's next read understand tickets; return what a handshake would tell."""
    if comm.stream is None:
        return None
    comm.__class__ = _COMMS.get(type(comm), type(comm))
    wire.unmeter(comm.stream)
    await shm.join_pool(comm)
    info: dict[str, Any] = comm.handshake_info()[shm.KEY]
    return info if "connection" in info or "exchange" in info else None


def _give_up(comm: Any) -> None:
    """Leave a comm as one whose handshake found nothing in common."""
    comm._end()
    wire.meter(comm.stream)


async def _begin(comm: Any) -> None:
    """End the peer's pending stock read by an empty message; tickets may follow it."""
    comm._plain = True
    try:
        await comm.write([])
    finally:
        comm._plain = False
    comm.handshake_options = {**comm.handshake_options, **shm.AGREED}
    logger.info("%r shares a pool with its peer from now on", comm)
