"""`specchat worker`: layers of a model whose terminal is on another machine."""

import socket
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from specchat.cli import options
from specchat.errors import UsageError
from specchat.loading.libraries import prepare_libraries
from specchat.loading.tokens import find_token

if TYPE_CHECKING:
    from specchat.ui.console import Talk


@dataclass(frozen=True)
class WorkerOptions:
    """Checked options of `specchat worker`.

    Attributes:
        address: host and port to listen on.
        token: token that the other machine must know.
        model: MODEL that has the files here, or None for the one that is asked for.
        device: device of the layers.
        vram_bytes: memory budget in bytes, or None for the default.
        quiet: whether only errors are shown.
    """

    address: tuple[str, int]
    token: bytes = field(repr=False)
    model: str | None
    device: str
    vram_bytes: int | None
    quiet: bool


def worker_options(
    model: str | None, listen: str | None, token_file: str | None, device: str | None, vram: str | None, *, quiet: bool
) -> WorkerOptions:
    """Return the options that the flags name.

    Raises:
        UsageError: no address, or an invalid value.
    """
    from specchat.engine.workers.wire import parse_address

    if listen is None:
        raise UsageError("a worker needs an address", hint="add --listen ADDRESS:PORT, such as 192.168.1.20:7000")
    return WorkerOptions(
        address=parse_address("--listen", listen),
        token=find_token(token_file),
        model=model,
        device="auto" if device is None else options.device("--device", device),
        vram_bytes=None if vram is None else options.size("--vram", vram),
        quiet=quiet,
    )


def work(chosen: WorkerOptions) -> NoReturn:
    """Serve one machine after the other until a signal ends the worker.

    Raises:
        AddressUnusableError: the address is not one of this machine, or is in use.
        DeviceUnusableError: the device cannot be used.
        LostWorkerError: another machine of a chat was lost.
    """
    from specchat.engine.workers.wire import listening_socket
    from specchat.ui.console import talk

    with closing(listening_socket(*chosen.address)) as listening:
        serve_on(listening, chosen, talk(quiet=chosen.quiet))


def serve_on(listening: socket.socket, chosen: WorkerOptions, say: "Talk") -> NoReturn:
    """Serve machines at a socket that listens.

    Raises:
        DeviceUnusableError: the device cannot be used.
        LostWorkerError: another machine of a chat was lost.
        OSError: the socket does not listen any more.
    """
    from specchat.engine.workers.session import serve_sessions
    from specchat.engine.workers.wire import is_private, shown
    from specchat.hardware.probe import find_machine
    from specchat.loading.worker import MachineHost
    from specchat.ui.progress import TalkReporter

    host, port = listening.getsockname()[:2]
    if not is_private(host):
        say.warn(
            f"{host} can be reached from outside: rows are neither encrypted nor authenticated; "
            "use an address of your own network, or a tunnel"
        )
    prepare_libraries()
    machine = find_machine(chosen.device)
    layers = MachineHost(machine, chosen.vram_bytes, chosen.model, TalkReporter(say))
    say.say(f"waiting at {shown(host, port)} with {machine.device} · Ctrl-C ends the worker")
    serve_sessions(listening, chosen.token, layers, lambda line: say.say(line, "dim"), say.warn)
