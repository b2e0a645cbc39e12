"""Dask's comm backends ``shm://`` and ``shm+tls://``, and those that take the place of ``tcp``."""

from __future__ import annotations

from typing import Any

from distributed.comm.tcp import (
    BaseTCPBackend,
    BaseTCPConnector,
    BaseTCPListener,
    TCPConnector,
    TCPListener,
    TLSConnector,
    TLSListener,
)

from dask_shm_bridge import figures
from dask_shm_bridge.attend import attend
from dask_shm_bridge.comm import ShmTCP, ShmTLS, join_pool


class ShmConnectorMixin(BaseTCPConnector):
    """Connectors whose comms may share a pool."""

    async def connect(self, address: str, deserialize: bool = True, **kwargs: Any) -> Any:
        """Connect, and have the pool at hand for the handshake."""
        comm: Any = await super().connect(  # type: ignore[no-untyped-call]
            address, deserialize=deserialize, **kwargs
        )
        try:
            await join_pool(comm)
        except BaseException:  # out of time: the peer must not wait for our handshake
            comm.abort()
            raise
        figures.attend_clients()
        return comm


class ShmListenerMixin(BaseTCPListener):
    """Listeners whose comms may share a pool."""

    async def on_connection(self, comm: Any, handshake_overrides: Any = None) -> None:
        """Have the pool at hand for the handshake."""
        await join_pool(comm)
        await super().on_connection(comm, handshake_overrides)


class ShmConnector(ShmConnectorMixin, TCPConnector):
    """Connects to ``shm://`` addresses."""

    prefix = "shm://"
    comm_class = ShmTCP


class ShmListener(ShmListenerMixin, TCPListener):
    """Listens on ``shm://`` addresses."""

    prefix = "shm://"
    comm_class = ShmTCP


class ShmTLSConnector(ShmConnectorMixin, TLSConnector):
    """Connects to ``shm+tls://`` addresses."""

    prefix = "shm+tls://"
    comm_class = ShmTLS


class ShmTLSListener(ShmListenerMixin, TLSListener):
    """Listens on ``shm+tls://`` addresses."""

    prefix = "shm+tls://"
    comm_class = ShmTLS


class _Backend(BaseTCPBackend):
    """A backend whose servers get their plugins when they listen."""

    def get_listener(
        self, loc: str, handle_comm: Any, deserialize: bool, **connection_args: Any
    ) -> Any:
        """Make a listener."""
        attend(handle_comm)
        return super().get_listener(  # type: ignore[no-untyped-call]
            loc, handle_comm, deserialize, **connection_args
        )


class ShmBackend(_Backend):
    """``shm://``: TCP for the control, the pool for the bytes."""

    _connector_class: type[BaseTCPConnector] = ShmConnector
    _listener_class: type[BaseTCPListener] = ShmListener


class ShmTLSBackend(_Backend):
    """``shm+tls://``: the same over TLS; needs ``shm-bridge.tls`` to use the pool."""

    _connector_class: type[BaseTCPConnector] = ShmTLSConnector
    _listener_class: type[BaseTCPListener] = ShmTLSListener


class NegotiatingConnector(ShmConnector):
    """Connects to ``tcp://`` addresses; the peer may be a stock one."""

    prefix = "tcp://"


class NegotiatingListener(ShmListener):
    """Listens on ``tcp://`` addresses; peers may be stock ones."""

    prefix = "tcp://"


class NegotiatingTLSConnector(ShmTLSConnector):
    """Connects to ``tls://`` addresses; the peer may be a stock one."""

    prefix = "tls://"


class NegotiatingTLSListener(ShmTLSListener):
    """Listens on ``tls://`` addresses; peers may be stock ones."""

    prefix = "tls://"


class NegotiatingBackend(_Backend):
    """In the place of ``tcp``: shares a pool with peers that have one."""

    _connector_class: type[BaseTCPConnector] = NegotiatingConnector
    _listener_class: type[BaseTCPListener] = NegotiatingListener


class NegotiatingTLSBackend(_Backend):
    """In the place of ``tls``."""

    _connector_class: type[BaseTCPConnector] = NegotiatingTLSConnector
    _listener_class: type[BaseTCPListener] = NegotiatingTLSListener
