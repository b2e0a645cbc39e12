"""Forks: a child keeps seeing its parent's arrays, and is no member itself.

A child inherits the mappings that its parent's views lie in, but leases belong to members. Without
more, the parent could give a lease back while the child still reads, and the bytes would change
under it. So before a fork a *guard* member gets a lease beside each of the parent's; it lives as
long as a lock that the child inherits, and needs nothing of the child. Where the ledger can't be
had at that moment, the child gets pages of its own instead.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any

from dask_shm_bridge import store

logger = logging.getLogger("dask_shm_bridge")

# By thread, since others may be about to fork as well: what was made for this fork.
_guards: dict[int, list[Any]] = {}
_unguarded: dict[int, list[store.Pool]] = {}


def register() -> None:
    """Have the functions below called around every ``os.fork`` (not around ``exec``)."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
        )


def _before() -> None:
    thread = threading.get_ident()
    guards, unguarded = _guards.setdefault(thread, []), _unguarded.setdefault(thread, [])
    for joined in store.joined():
        try:
            guard = joined.guard()
        except Exception as error:
            logger.debug("a fork without a guard: %s", error)
            unguarded.append(joined)
        else:
            if guard is not None:
                guards.append(guard)


def _after_in_parent() -> None:
    thread = threading.get_ident()
    _unguarded.pop(thread, None)
    for guard in _guards.pop(thread, ()):
        guard.close()


def _after_in_child() -> None:
    try:
        for joined in _unguarded.get(threading.get_ident(), ()):
            joined.views.privatise_all()
    finally:
        _unguarded.clear()
        _kept.extend(_guards.values())  # open for as long as this process lives
        _guards.clear()
        store.forget()


_kept: list[Any] = []
