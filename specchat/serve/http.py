"""The HTTP server: its address, and its end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from specchat.errors import AddressUnusableError

# Seconds to wait for clients that do not read the end of their answers.
_GRACE_S = 3
_BACKLOG = 128


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket at an address, on which nobody can connect yet.

    Args:
        host: name or address.
        port: port; 0 takes a free one.

    Raises:
        AddressUnusableError: the address does not exist on this machine, is in use, or is not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise AddressUnusableError(f"--host {host} is no address of this machine") from error
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise _unusable(host, port, error) from error
    return found


def start_listening(bound: socket.socket) -> None:
    """Let clients connect.

    Raises:
        AddressUnusableError: another program has begun to listen at this address.
    """
    host, port = address_of(bound)
    try:
        bound.listen(_BACKLOG)
    except OSError as error:
        raise _unusable(host, port, error) from error


def address_of(bound: socket.socket) -> tuple[str, int]:
    """Return the address of a socket and its port."""
    host, port = bound.getsockname()[:2]
    return str(host), int(port)


def url_of(bound: socket.socket) -> str:
    """Return the address that clients call their base URL."""
    host, port = address_of(bound)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_loopback(bound: socket.socket) -> bool:
    """Return whether only programs on this machine can connect."""
    return ipaddress.ip_address(address_of(bound)[0]).is_loopback


def _unusable(host: str, port: int, error: OSError) -> AddressUnusableError:
    reason = (error.strerror or str(error)).lower()
    return AddressUnusableError(
        f"cannot listen on port {port} of {host}: {reason}", hint="choose another --port; --port 0 takes a free one"
    )


class HttpServer(uvicorn.Server):
    """A server that ends its answers when it is asked to end.

    Args:
        app: application.
        on_stop: function that is called on the event loop when the server begins to end.
    """

    def __init__(self, app: ASGIApp, on_stop: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        super().__init__(config)
        self._on_stop = on_stop
        self.ended_by: int | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end after a signal; a second Ctrl-C does not wait for clients."""
        self.ended_by = sig
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all answers, and then all connections."""
        self._on_stop()
        await super().shutdown(sockets)
