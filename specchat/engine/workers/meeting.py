"""Where the ranks of a job meet: a store in which workers leave their addresses."""

from __future__ import annotations

import socket
from datetime import timedelta

import torch.distributed as dist

from specchat.errors import WorkerUnreachableError

_MEET_S = 120.0  # ranks import the libraries first
_ENDED = "ended"


class MeetingPoint:
    """The store of a job, where workers leave their addresses. It sees neither the token nor rows.

    Args:
        address: host and port of the store.
        rank, size: number of this process, and of all processes.
        attempt: number of times that the job was started again.
        is_master: whether this process keeps the store.
        patience_s: seconds that the other ranks may take to arrive.

    Raises:
        WorkerUnreachableError: the store does not answer.
    """

    def __init__(
        self,
        address: tuple[str, int],
        rank: int,
        size: int,
        *,
        attempt: int = 0,
        is_master: bool = False,
        patience_s: float = _MEET_S,
    ) -> None:
        self._address = address
        self._rank, self._size, self._attempt = rank, size, attempt
        self._patience_s = patience_s
        patience = timedelta(seconds=patience_s)
        try:
            make = dist.TCPStore  # type: ignore[attr-defined]  # documented, but not in `__all__`
            self._store = make(*address, is_master=is_master, timeout=patience, wait_for_workers=False)
        except RuntimeError as error:
            host, port = address
            raise WorkerUnreachableError(
                f"no store of torchrun answers at {host}:{port}", hint="start the job with torchrun on every machine"
            ) from error

    def own_host(self) -> str:
        """Return the address of this machine that the store's machine is reached from."""
        family, kind, protocol, _, there = socket.getaddrinfo(*self._address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as asked:
            asked.connect(there)  # of datagrams: nothing is sent
            host: str = asked.getsockname()[0]
        return host

    def tell(self, address: tuple[str, int]) -> None:
        """Leave the address of this worker."""
        self._store.set(self._key(self._rank), "\n".join(map(str, address)))

    def workers(self) -> tuple[tuple[str, int], ...]:
        """Wait for all workers and return their addresses, by rank.

        Raises:
            WorkerUnreachableError: a worker has left no address.
        """
        found = []
        for rank in range(1, self._size):
            try:
                host, _, port = self._store.get(self._key(rank)).decode().partition("\n")
            except RuntimeError as error:
                raise WorkerUnreachableError(
                    f"rank {rank} has not come within {self._patience_s:.0f} s",
                    hint="look at what that rank printed; start the same command on every machine",
                ) from error
            found.append((host, int(port)))
        return tuple(found)

    def end(self) -> None:
        """Tell all ranks that the job has ended."""
        self._store.set(self._key(_ENDED), "")

    def has_ended(self) -> bool:
        """Return whether the job has ended, or its store."""
        try:
            return bool(self._store.check([self._key(_ENDED)]))
        except RuntimeError:
            return True

    def _key(self, name: int | str) -> str:
        return f"specchat/{self._attempt}/{name}"
