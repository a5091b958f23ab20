"""`bench --limit-memory`: limits that are too small are refused with the smallest one that works."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from specchat.cli import bench_limit
from specchat.cli.bench_limit import check_limit, limited
from specchat.errors import BudgetError, DoesNotFitError
from specchat.hardware import probe
from specchat.planner.placement import needed_ram, usable_ram
from specchat.records.limits import COMPILER_BYTES, RUNTIME_BYTES
from specchat.records.plan import PlanChoices
from specchat.units import GIB, MIB, parse_size

NEEDED = 300 * MIB
ON_CPU = PlanChoices(device="cpu")


class Group:
    """A control group that only notes what happens to it."""

    entered = 0

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    def enter(self) -> None:
        Group.entered += 1

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def left(monkeypatch):
    """Let a group of `limit` bytes leave all but 200 MiB."""
    Group.entered = 0
    monkeypatch.setattr(bench_limit, "MemoryGroup", Group)

    def leave(limit_bytes: int) -> None:
        found = SimpleNamespace(device="cpu", ram_available_bytes=limit_bytes - 200 * MIB)
        monkeypatch.setattr(bench_limit, "find_machine", lambda _: found)

    return leave


def smallest(error: DoesNotFitError) -> int:
    assert error.hint is not None
    return parse_size(error.hint.removeprefix("use --limit-memory ").removesuffix(" or more"))


def plan(num_bytes: int, device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(work=SimpleNamespace(device=device), device_bytes=num_bytes)


def test_a_refused_plan_names_the_smallest_limit_that_works(left):
    limit = 560 * MIB
    left(limit)
    with pytest.raises(DoesNotFitError, match=r"leaves 264 MiB .*, but the plan needs 300 MiB") as caught:  # noqa: SIM117
        with limited(limit, ON_CPU, lambda: NEEDED):
            raise BudgetError("too small", None, NEEDED)
    assert smallest(caught.value) == 608 * MIB
    for limit, fits in ((608 * MIB, True), (592 * MIB, False)):
        left(limit)
        if fits:
            check_limit(limit, [plan(NEEDED)])  # type: ignore[list-item]
        else:
            with pytest.raises(DoesNotFitError) as caught:
                check_limit(limit, [plan(NEEDED)])  # type: ignore[list-item]
            assert smallest(caught.value) == 608 * MIB


def test_a_limit_below_the_libraries_names_one_that_has_room_for_the_plan(left):
    left(300 * MIB)
    with (
        pytest.raises(DoesNotFitError, match="less than Python and its libraries") as caught,
        limited(300 * MIB, ON_CPU, lambda: NEEDED),
    ):
        pytest.fail("entered")
    assert not Group.entered
    libraries = probe.libraries_bytes()
    assert libraries <= smallest(caught.value) <= libraries + needed_ram(NEEDED, is_confined=True) + 16 * MIB


def test_budgets_of_the_user_and_of_gpus_are_refused_as_they_are(left, monkeypatch):
    left(GIB)
    for choices, device in ((replace(ON_CPU, vram_bytes=NEEDED), "cpu"), (PlanChoices(), "cuda:0")):
        monkeypatch.setattr(bench_limit, "find_machine", lambda _, device=device: SimpleNamespace(device=device))
        with pytest.raises(BudgetError, match="too small"), limited(GIB, choices, lambda: NEEDED):
            raise BudgetError("too small", None, NEEDED)
    check_limit(GIB, [plan(8 * GIB, "cuda:0")])  # type: ignore[list-item]
    check_limit(None, [plan(8 * GIB)])  # type: ignore[list-item]


def test_plans_that_are_loaded_together_share_the_limit(left):
    left(GIB)
    check_limit(GIB, [plan(500 * MIB)])  # type: ignore[list-item]
    with pytest.raises(DoesNotFitError, match=r"the plan needs 1000 MiB"):
        check_limit(GIB, [plan(500 * MIB), plan(500 * MIB)])  # type: ignore[list-item]


@pytest.mark.parametrize("is_confined", [False, True])
def test_the_needed_memory_leaves_what_is_used(is_confined):
    for used in (0, 1, 10 * MIB, 300 * MIB, 900 * MIB, 3 * GIB, 40 * GIB):
        needed = needed_ram(used, is_confined=is_confined)
        assert used <= usable_ram(needed, is_confined=is_confined) <= used + 1
        assert usable_ram(needed - 2, is_confined=is_confined) < used or not used


@pytest.mark.parametrize("compiles", [False, True])
def test_memory_that_libraries_will_take_is_not_available(compiles, monkeypatch):
    """A plan may be made before torch is imported or afterwards; numba takes memory where it is installed."""
    monkeypatch.setattr(probe, "has_compiler", lambda: compiles)
    needed = RUNTIME_BYTES + COMPILER_BYTES * compiles
    found = set()
    for taken in (50 * MIB, 300 * MIB, needed):
        monkeypatch.setattr(probe, "resident_set_bytes", lambda taken=taken: taken)
        monkeypatch.setattr(probe, "available_ram_bytes", lambda taken=taken: GIB - taken)
        found.add(probe.find_machine("cpu").ram_available_bytes)
    assert found == {GIB - needed}
    monkeypatch.setattr(probe, "resident_set_bytes", lambda: 2 * needed)
    assert probe.find_machine("cpu").ram_available_bytes == GIB - needed
    monkeypatch.setattr(probe, "available_ram_bytes", lambda: 0)
    assert probe.find_machine("cpu").ram_available_bytes == 0
