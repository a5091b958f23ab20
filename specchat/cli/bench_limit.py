"""A bench under a memory limit: a limit that is too small is refused, because the system would end the process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from specchat.errors import BudgetError, DoesNotFitError
from specchat.hardware.memory_group import MemoryGroup
from specchat.hardware.probe import find_machine, libraries_bytes
from specchat.hardware.system import shared_bytes
from specchat.planner.placement import needed_ram, usable_ram
from specchat.records.plan import Plan, PlanChoices
from specchat.units import MIB, format_bytes, size_text

_STEP_BYTES = 16 * MIB  # of limits in hints
_PLANNING_BYTES = 384 * MIB  # of a process that makes a plan


@contextmanager
def limited(limit_bytes: int, choices: PlanChoices, least_bytes: Callable[[], int]) -> Iterator[None]:
    """Run the block in a memory control group.

    Args:
        limit_bytes: most bytes of memory and page cache.
        choices: device and memory budget of the user.
        least_bytes: function that returns the memory of the smallest plan on the device.

    Raises:
        DoesNotFitError: the limit has no room for Python, its libraries and the smallest plan.
        NotAvailableError: the system does not permit limits.
    """
    if limit_bytes < _PLANNING_BYTES:  # the system would end the process without a word
        on_host = least_bytes() if find_machine(choices.device).device == "cpu" else 0
        # Pages of the libraries' files that are in memory already are not charged to the group.
        libraries = libraries_bytes()
        smallest = libraries - shared_bytes() + needed_ram(on_host, is_confined=True)
        raise DoesNotFitError(
            f"--limit-memory {format_bytes(limit_bytes)} is less than Python and its libraries take "
            f"({format_bytes(libraries)})",
            hint=_use(max(smallest, libraries)),
        )
    with MemoryGroup(limit_bytes) as group:
        group.enter()
        try:
            yield
        except BudgetError as error:
            machine = find_machine(choices.device)
            if machine.device != "cpu" or choices.vram_bytes is not None:
                raise
            raise _refusal(limit_bytes, error.needed_bytes, machine.ram_available_bytes) from error


def check_limit(limit_bytes: int | None, plans: list[Plan]) -> None:
    """Check that all plans that are loaded fit into the limit together.

    Args:
        limit_bytes: limit of the control group that this process is in; None without a limit.
        plans: plans that are loaded at the same time.

    Raises:
        DoesNotFitError: plans that need more than the limit leaves.
    """
    if limit_bytes is None or plans[0].work.device != "cpu":
        return
    needed, available = sum(plan.device_bytes for plan in plans), find_machine("cpu").ram_available_bytes
    if needed > usable_ram(available, is_confined=True):
        raise _refusal(limit_bytes, needed, available)


def _refusal(limit_bytes: int, needed_bytes: int, available_bytes: int) -> DoesNotFitError:
    """Return the error that names the smallest limit."""
    left = usable_ram(available_bytes, is_confined=True)
    return DoesNotFitError(
        f"--limit-memory {format_bytes(limit_bytes)} leaves {format_bytes(left)} beside Python and its libraries, "
        f"but the plan needs {format_bytes(needed_bytes)}",
        hint=_use(limit_bytes + needed_ram(needed_bytes, is_confined=True) - available_bytes),
    )


def _use(limit_bytes: int) -> str:
    return f"use --limit-memory {size_text(-(-limit_bytes // _STEP_BYTES) * _STEP_BYTES)} or more"
