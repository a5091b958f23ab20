"""Messages between two machines: both prove that they know one token, and every later message is authenticated.

Neither end sends the token. Each sends a nonce; the end that connects proves first, so that a stranger who connects
learns nothing that he could try tokens against. Later messages carry a code over a key of this connection, the
direction and a counter. They are JSON and not encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from specchat.errors import AddressUnusableError, UsageError, WorkerUnreachableError, WrongTokenError

Message = Mapping[str, Any]

# Seconds that an unproven end may take for its part of the handshake, and that connecting may take.
HANDSHAKE_S = 5.0
# Fewest characters of a token: a listener to a handshake can try tokens in private.
MIN_TOKEN = 16
TOKEN_HINT = 'set SPECCHAT_TOKEN, or --token-file; python -c "import secrets; print(secrets.token_urlsafe())" makes one'

_MAGIC = "specchat-worker-1"
_CODE_BYTES = 16
_MOST_UNPROVEN = 1 << 10
_MOST_BYTES = 1 << 26
_LENGTH = struct.Struct(">I")


class ConnectionEndedError(Exception):
    """The other end closed the connection, stopped sending, or sent something else; internal to the engine."""


def check_token(token: str | None) -> bytes:
    """Return the bytes of a token.

    Raises:
        WrongTokenError: a token that is missing or too short.
    """
    if not token:
        raise WrongTokenError("workers need a token that both machines know", hint=TOKEN_HINT)
    if len(token) < MIN_TOKEN:
        raise WrongTokenError(f"the token must have at least {MIN_TOKEN} characters", hint=TOKEN_HINT)
    return token.encode()


def parse_address(name: str, text: str) -> tuple[str, int]:
    """Return host and port of an address such as 10.0.0.2:7000 or [::1]:7000.

    Args:
        name: name of the setting, for messages.
        text: address.

    Raises:
        UsageError: no host, or no port from 0 to 65535.
    """
    host, colon, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not port.isascii() or int(port) > 65535:
        raise UsageError(f"{name} must be HOST:PORT, not '{text}'", hint="write for example 192.168.1.20:7000")
    return host, int(port)


def shown(host: str, port: int) -> str:
    """Return an address as users write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_private(host: str) -> bool:
    """Return whether only this machine or its own network can reach an address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return (address.is_private or address.is_loopback or address.is_link_local) and not address.is_unspecified


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at one address of this machine.

    Raises:
        AddressUnusableError: the address is not one of this machine, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise AddressUnusableError(f"{host} is no address of this machine") from error
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(8)
    except OSError as error:
        found.close()
        reason = (error.strerror or str(error)).lower()
        raise AddressUnusableError(
            f"cannot listen on {shown(host, port)}: {reason}", hint="name an address of this machine and a free port"
        ) from error
    return found


def connect(host: str, port: int, token: bytes) -> Channel:
    """Connect to a worker, and prove to each other that both know the token.

    Raises:
        WorkerUnreachableError: nobody answers at the address, or something else than a worker.
        WrongTokenError: the worker has another token.
    """
    where = shown(host, port)
    try:
        connected = socket.create_connection((host, port), HANDSHAKE_S)
    except (OSError, UnicodeError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        raise WorkerUnreachableError(
            f"the worker {where} cannot be reached: {reason.lower()}",
            hint=f"start it there: specchat worker --listen {where}",
        ) from error
    try:
        return _prove_first(connected, token, where)
    except BaseException:
        connected.close()
        raise


def accept(connected: socket.socket, token: bytes) -> Channel:
    """Let the other end prove that it knows the token, and prove the same.

    Raises:
        WrongTokenError: the other end has another token.
        ConnectionEndedError: the other end does not run specchat, or takes too long.
    """
    connected.settimeout(HANDSHAKE_S)
    ours = secrets.token_hex(16)
    _send_plain(connected, {"nonce": ours})
    first = _receive_plain(connected)
    theirs = str(first.get("nonce"))
    if first.get("magic") != _MAGIC:
        raise ConnectionEndedError("it does not speak the language of workers")
    if not _is_proof(first.get("proof"), token, "chief", theirs, ours):
        with suppress(OSError):
            _send_plain(connected, {"refused": "token"})
        raise WrongTokenError("another token")
    _send_plain(connected, {"proof": _proof(token, "worker", theirs, ours)})
    return Channel(connected, _key(token, theirs, ours), is_chief=False)


def _prove_first(connected: socket.socket, token: bytes, where: str) -> Channel:
    try:
        connected.settimeout(HANDSHAKE_S)
        theirs = str(_receive_plain(connected).get("nonce"))
        ours = secrets.token_hex(16)
        _send_plain(connected, {"magic": _MAGIC, "nonce": ours, "proof": _proof(token, "chief", ours, theirs)})
        answer = _receive_plain(connected)
    except (OSError, ConnectionEndedError) as error:
        raise WorkerUnreachableError(
            f"the worker {where} does not answer: it serves another machine, or is no worker"
        ) from error
    if answer.get("refused") or not _is_proof(answer.get("proof"), token, "worker", ours, theirs):
        raise WrongTokenError(
            f"the worker {where} has another token",
            hint="set the same SPECCHAT_TOKEN, or --token-file, on both machines",
        )
    return Channel(connected, _key(token, ours, theirs), is_chief=True)


def _proof(token: bytes, who: str, chief: str, worker: str) -> str:
    return hmac.new(token, f"{_MAGIC} {who} {chief} {worker}".encode(), hashlib.sha256).hexdigest()


def _is_proof(given: object, token: bytes, who: str, chief: str, worker: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), _proof(token, who, chief, worker).encode())


def _key(token: bytes, chief: str, worker: str) -> bytes:
    return bytes.fromhex(_proof(token, "key", chief, worker))


def _send_plain(connected: socket.socket, message: Message) -> None:
    body = json.dumps(message).encode()
    connected.sendall(_LENGTH.pack(len(body)) + body)


def _receive_plain(connected: socket.socket) -> Message:
    (length,) = _LENGTH.unpack(_receive_bytes(connected, _LENGTH.size))
    if length > _MOST_UNPROVEN:
        raise ConnectionEndedError("it sent too much")
    return _parsed(_receive_bytes(connected, length))


def _parsed(body: bytes) -> Message:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise ConnectionEndedError("it sent something else than a message") from error
    if not isinstance(found, dict):
        raise ConnectionEndedError("it sent something else than a message")
    return found


def _receive_bytes(connected: socket.socket, count: int) -> bytes:
    """Receive `count` bytes.

    Raises:
        ConnectionEndedError: the connection was closed before.
        TimeoutError: nothing came within the time limit of the socket.
    """
    found = bytearray()
    while len(found) < count:
        more = connected.recv(min(count - len(found), 1 << 20))
        if not more:
            raise ConnectionEndedError("the connection was closed")
        found += more
    return bytes(found)


class Channel:
    """A connection whose ends know each other; any thread may send, and one thread receives.

    Args:
        connected: socket after the handshake.
        key: key of this connection.
        is_chief: whether this end has connected.

    Attributes:
        here: address of this end.
        there: address of the other end.
    """

    def __init__(self, connected: socket.socket, key: bytes, *, is_chief: bool) -> None:
        self._socket = connected
        self._key = key
        self._names = (b"chief", b"worker") if is_chief else (b"worker", b"chief")
        self._num_sent = self._num_received = 0
        self._sending = threading.Lock()
        self.here: str = connected.getsockname()[0]
        self.there: str = connected.getpeername()[0]
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_patience(self, seconds: float) -> None:
        """Set the seconds after which an end that sends nothing, or takes nothing, counts as lost."""
        self._socket.settimeout(seconds)

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the connection was closed, or the other end takes nothing any more.
        """
        body = json.dumps(message).encode()
        assert len(body) <= _MOST_BYTES, f"a message of {len(body)} bytes"
        with self._sending:
            code = self._code(self._names[0], self._num_sent, body)
            self._num_sent += 1
            self._socket.sendall(_LENGTH.pack(len(body)) + code + body)

    def receive(self) -> Message:
        """Receive the next message.

        Raises:
            ConnectionEndedError: the connection was closed, or a message is not from the other end.
            OSError: nothing came within the time limit, or the connection broke.
        """
        length, code = self._receive_head()
        body = _receive_bytes(self._socket, length)
        if not hmac.compare_digest(code, self._code(self._names[1], self._num_received, body)):
            raise ConnectionEndedError("a message was changed on its way")
        self._num_received += 1
        return _parsed(body)

    def close(self) -> None:
        """Close the connection, which wakes a thread that receives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive_head(self) -> tuple[int, bytes]:
        head = _receive_bytes(self._socket, _LENGTH.size + _CODE_BYTES)
        (length,) = _LENGTH.unpack(head[: _LENGTH.size])
        if length > _MOST_BYTES:
            raise ConnectionEndedError("it sent too much")
        return length, head[_LENGTH.size :]

    def _code(self, who: bytes, number: int, body: bytes) -> bytes:
        text = who + number.to_bytes(8, "big") + body
        return hmac.new(self._key, text, hashlib.sha256).digest()[:_CODE_BYTES]
