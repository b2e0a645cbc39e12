"""What goes into the pool, and what comes out, between a comm and its pool."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any, NamedTuple

from dask_shm_bridge.ledger import Grant

Events = SimpleQueue[tuple[str, Any]]


class Frame(NamedTuple):
    """A frame of a message that should go through the pool.

    `place` is where it stands in the message, `number` that of its ticket under the connection.
    """

    place: int
    number: int
    buffer: Any
    nbytes: int


class Shipment:
    """The tickets of one message, until it is sent or given up.

    Attributes
    ----------
    tickets : dict of int to int
        Place in the message to ticket number.
    refused : dict of int to str
        Place in the message to the cause why the frame has no ticket.
    room_bytes : int
        If something was refused for want of space: the longest run that was free, for pieces.
    copied, referenced : list of int
        Bytes of the frames that were copied into the pool, and that were there already.
    """

    def __init__(self, events: Events, connection: int) -> None:
        self._events = events
        self._connection = connection
        self.tickets: dict[int, int] = {}
        self.refused: dict[int, str] = {}
        self.room_bytes = 0
        self.copied: list[int] = []
        self.referenced: list[int] = []

    def undo(self) -> None:
        """Take the tickets back: the message will not be sent."""
        for number in self.tickets.values():
            self._events.put(("ticket", (self._connection, number)))
        self.tickets.clear()


class Received:
    """The buffers of one message's tickets; whoever drops it drops their leases.

    Attributes
    ----------
    buffers : list of memoryview
        In the order of the tickets.
    viewed, copied : list of int
        Bytes of those that are views of the pool, and that had to be copied out.
    waiting : list of (int, Grant)
        Places in `buffers` that `Pool.copy_out` has yet to fill.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self.buffers: list[memoryview] = []
        self.viewed: list[int] = []
        self.copied: list[int] = []
        self.waiting: list[tuple[int, Grant]] = []

    def __del__(self) -> None:
        for _, grant in self.waiting:
            self._events.put(("lease", (grant.extent, grant.lease)))

    def undo(self) -> None:
        """Drop the views, and give back what no view will give back by itself."""
        self.__del__()
        self.waiting.clear()
        self.buffers.clear()
