"""Commands that torchrun starts once a rank: rank 0 does the work, and the other ranks compute layers for it."""

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from specchat.cli.bench_options import BenchOptions
from specchat.cli.options import RunOptions
from specchat.cli.worker import WorkerOptions, serve_on
from specchat.errors import UsageError
from specchat.loading.request import ModelRequest, WorkersChoice
from specchat.loading.tokens import find_token
from specchat.loading.torchrun import find_ranks
from specchat.threads import Thread

if TYPE_CHECKING:
    import socket

    from specchat.engine.workers.meeting import MeetingPoint
    from specchat.loading.torchrun import Ranks

Job = TypeVar("Job", RunOptions, BenchOptions)

_LOOK_S = 0.3


def on_all_ranks(options: Job, token_file: str | None, do: Callable[[Job], int]) -> int:
    """Do a command on rank 0 with the other ranks as workers; without torchrun, do it here alone.

    Args:
        options: options of the command.
        token_file: file with the token that all ranks know; None for the variable SPECCHAT_TOKEN.
        do: function that does the command and returns its exit code.

    Raises:
        UsageError: workers were named besides those of torchrun.
        WrongTokenError: a token that is missing or too short.
        WorkerUnreachableError: the other ranks do not come.
    """
    ranks = find_ranks()
    if ranks is None:
        return do(options)
    for flag, given in (("--workers", options.models.workers), ("--devices", options.models.choices.devices)):
        if given:
            raise UsageError(f"torchrun's ranks are the workers, so {flag} has no place", hint=f"leave {flag} out")
    from specchat.engine.workers.meeting import MeetingPoint

    token = find_token(token_file)
    is_master = ranks.rank == 0 and not ranks.has_store
    point = MeetingPoint(ranks.address, ranks.rank, ranks.size, attempt=ranks.attempt, is_master=is_master)
    if ranks.rank:
        return _serve(options.models, token, ranks, point)
    try:
        return do(replace(options, models=replace(options.models, workers=WorkersChoice(point.workers(), token))))
    finally:
        point.end()


def refuse_torchrun(command: str) -> None:
    """Refuse a command that talks with one person.

    Raises:
        UsageError: torchrun has started this process as one of several.
    """
    if find_ranks() is not None:
        raise UsageError(
            f"torchrun starts {command} once for every rank",
            hint="start specchat worker on the other machines and use --workers; torchrun starts --prompts and bench",
        )


def _serve(request: ModelRequest, token: bytes, ranks: "Ranks", point: "MeetingPoint") -> int:
    """Compute layers until the job has ended."""
    from specchat.engine.workers.wire import listening_socket
    from specchat.ui.console import talk

    choices = request.choices
    host = point.own_host()
    ended = threading.Event()
    with closing(listening_socket(host, 0)) as listening:
        chosen = WorkerOptions(
            address=(host, listening.getsockname()[1]),
            token=token,
            model=request.model,
            device=_device_of(choices.device, ranks.local_rank),
            vram_bytes=choices.vram_bytes,
            quiet=True,
        )
        Thread(lambda: _end_with(point, listening, ended)).start()
        point.tell(chosen.address)
        try:
            serve_on(listening, chosen, talk(quiet=True))
        except OSError:
            if not ended.is_set():
                raise
    return 0


def _end_with(point: "MeetingPoint", listening: "socket.socket", ended: threading.Event) -> None:
    """Wait for the end of the job, and wake the thread that waits for a connection."""
    import socket

    while not point.has_ended():
        ended.wait(_LOOK_S)
    ended.set()
    listening.shutdown(socket.SHUT_RDWR)


def _device_of(device: str, local_rank: int) -> str:
    """Return the device of a rank: the GPU of its number where a machine has several, unless one was named."""
    from specchat.hardware.probe import gpu_names

    names = gpu_names() if device == "auto" else []
    return names[local_rank] if local_rank < len(names) > 1 else device
