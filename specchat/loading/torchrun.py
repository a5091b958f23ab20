"""Jobs that torchrun starts on several machines: rank 0 has the prompts, and the other ranks are its workers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from specchat.errors import UsageError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job.

    Attributes:
        rank, size: number of this process, and of all processes.
        local_rank: number of this process on its machine.
        address: host and port of torchrun's store.
        has_store: whether torchrun keeps the store, not rank 0.
        attempt: number of times that torchrun has started the job again.
    """

    rank: int
    size: int
    local_rank: int
    address: tuple[str, int]
    has_store: bool
    attempt: int


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """Return the ranks of torchrun's environment; None without it, or for a single process.

    Raises:
        UsageError: a variable of torchrun's is no number.
    """
    if any(name not in environment for name in _VARIABLES):
        return None

    def number(name: str, default: str = "") -> int:
        text = environment.get(name, default)
        if not text.isdecimal():
            raise UsageError(f"{name} is '{text}', not a number", hint="start the job with torchrun")
        return int(text)

    size = number("WORLD_SIZE")
    if size == 1:
        return None
    return Ranks(
        rank=number("RANK"),
        size=size,
        local_rank=number("LOCAL_RANK", "0"),
        address=(environment["MASTER_ADDR"], number("MASTER_PORT")),
        has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=number("TORCHELASTIC_RESTART_COUNT", "0"),
    )
