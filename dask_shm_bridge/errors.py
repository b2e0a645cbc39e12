"""What can go wrong, by name. Every class can be pickled: errors cross processes."""

from __future__ import annotations


class BridgeError(Exception):
    """Base class of every error that dask-shm-bridge raises itself."""


class PoolError(BridgeError):
    """The pool can't be attached or used; the message says which one and what to do."""


class PoolUnsupportedError(PoolError):
    """This platform has no shared pool (yet); transfers stay on TCP."""


class PoolUnsafeError(PoolError):
    """A file or directory of the pool has the wrong owner, mode or type."""


class PoolLayoutError(PoolError):
    """The pool in use has another layout or format than the one asked for.

    Attributes
    ----------
    wanted, found : str
        Both layouts, in words.
    """

    def __init__(self, path: str, wanted: str, found: str) -> None:
        super().__init__(path, wanted, found)
        self.path = path
        self.wanted = wanted
        self.found = found

    def __str__(self) -> str:
        return (
            f"the pool in {self.path} is in use with {self.found}, but the configuration asks "
            f"for {self.wanted}: use the same shm-bridge.pool settings in all processes, set "
            "another shm-bridge.pool.path, or end the processes that use the old pool"
        )


class LocationError(PoolError):
    """A path has no name on the other side, or lies where no pool may lie; the message says why."""


class HeaderError(BridgeError):
    """The header of an array that a peer sent does not fit its bytes; nothing was made of it."""


class LedgerError(BridgeError):
    """A refused ledger operation; it changed nothing."""


class LedgerBusyError(LedgerError):
    """The ledger's lock was not had in time (a member may be stopped inside it)."""


class LedgerDamagedError(LedgerError):
    """The ledger says what can't be: something other than its members has written there."""


class LedgerFullError(LedgerError):
    """The ledger has no room for another row."""


class ConnectionGoneError(LedgerError):
    """The receiver of a connection has taken its row away: the peer is gone."""


class StaleTicketError(LedgerError):
    """A ticket, or the lease it should be made from, is not (or no longer) in the ledger."""


class MemberGoneError(LedgerError):
    """This member is not in the ledger any more (it was taken for dead)."""


class NoGpuWorkerError(BridgeError):
    """A task needs a GPU, and no worker has one (``shm-bridge.placement.no-gpu: error``).

    Attributes
    ----------
    task : str
        Its key.
    """

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.task = task

    def __str__(self) -> str:
        return (
            f"task {self.task!r} needs a GPU, but no worker has the resource GPU: start one with "
            "`dask worker --resources GPU=1`, set shm-bridge.placement.no-gpu on the scheduler to "
            "wait (for such a worker) or to cpu (run anywhere), or submit it under "
            "dask.annotate(shm_bridge_gpu=False)"
        )
