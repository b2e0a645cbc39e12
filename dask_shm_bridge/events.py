"""What happened, for ``client.get_events("shm-bridge")``: modes, fallbacks, probes.

An event is said by whatever is in this process: its scheduler, its worker, else its client. Nothing
waits for that, and nothing fails by it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("dask_shm_bridge")

TOPIC = "shm-bridge"

_turn = threading.Lock()
_servers: list[tuple[Any, weakref.WeakMethod[Callable[[str, Any], Any]]]] = []


def _new_lock() -> None:
    """Replace the lock in a forked child, where another thread may have held it."""
    global _turn
    _turn = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def attach(server: Any) -> None:
    """Say events of this process by a running scheduler or worker, from now on."""
    with _turn:
        known = [said for _, said in _servers if said() is not None]
        if not any(said() == server.log_event for said in known):
            _servers.append((server.loop, weakref.WeakMethod(server.log_event)))


def publish(kind: str, **fields: Any) -> None:
    """Say an event: its kind, and fields that msgpack knows. From any thread, never an error.

    What happens before a process has a server or a client that runs is in its log alone.
    """
    try:
        said = _said()
        if said is not None:
            loop, say = said
            loop.add_callback(_say, say, {"kind": kind, **fields})
    except Exception as error:
        logger.debug("an event was not said: %r", error)


def _say(say: Callable[[str, Any], Any], event: dict[str, Any]) -> Any:
    try:
        return say(TOPIC, event)
    except Exception as error:  # the stream is closed, or not there yet
        logger.debug("an event was not said: %r", error)
        return None


def _said() -> tuple[Any, Callable[[str, Any], Any]] | None:
    with _turn:
        _servers[:] = [(loop, say) for loop, say in _servers if say() is not None]
        for loop, reference in _servers:
            say = reference()
            if say is not None and say.__self__.status.name == "running":  # type: ignore[attr-defined]
                return loop, say
    module = sys.modules.get("distributed.client")
    if module is None:
        return None
    try:
        client = module.default_client()
    except ValueError:
        return None
    return (client.loop, client.log_event) if client.status == "running" else None
