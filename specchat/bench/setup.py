"""From a plan to the systems that are measured: everything loaded, each baseline on the same layers as we are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from specchat.bench.cold import RESIDENT, TimePass
from specchat.bench.identity import Margin
from specchat.bench.records import OWN
from specchat.bench.systems import EngineSystem, OffloadedSystem, System
from specchat.errors import UsageError
from specchat.loading.engine import open_engine
from specchat.records.generation import Sampling
from specchat.records.model import LOWER_QUANTS, ModelSource
from specchat.records.plan import MemoryReport, Plan

if TYPE_CHECKING:
    from specchat.bench.baselines import OffloadedModel
    from specchat.engine.engine import Engine
    from specchat.models.packs.pack import Pack


@dataclass(frozen=True)
class Loaded:
    """What a measurement works with.

    Attributes:
        engine: ours.
        systems: ours first, then the baselines.
        offloaded: the baselines' models, by name.
        margin: of the target's best token over the second, after a text.
        memory_before: what was held when our system was warm and no baseline loaded.
    """

    engine: Engine
    systems: tuple[System, ...]
    offloaded: dict[str, OffloadedModel]
    margin: Margin
    memory_before: MemoryReport

    def memory(self) -> MemoryReport:
        """What our system holds, without the baselines: they live in the same process, and its peaks are theirs, too.

        On the CPU the device's peak is counted item by item and stays ours; all other peaks are taken from before.
        """
        now = self.engine.memory()
        if not self.offloaded:
            return now
        device_peak = (
            now.device_peak_bytes if self.engine.plan.work.device == "cpu" else self.memory_before.device_peak_bytes
        )
        return replace(self.memory_before, device_peak_bytes=device_peak)

    def pass_timers(self, rows: int) -> dict[str, TimePass]:
        """What times one pass of `rows` rows, for every system that has passes of its own: ours first."""

        def other(model: OffloadedModel) -> tuple[float, int | None]:
            return model.measure_pass(rows), None

        timers: dict[str, TimePass] = {OWN: partial(_own_pass, self.engine, rows)}
        if "accelerate" in self.offloaded:
            timers["accelerate"] = partial(other, self.offloaded["accelerate"])
        return timers


@contextmanager
def page_cache_timers(
    plan: Plan, target: ModelSource, pack: Pack, others: Mapping[str, TimePass], rows: int
) -> Iterator[dict[str, TimePass]]:
    """What times passes while the page cache has the files, ours first: streamed from it, then all layers resident.

    Args:
        plan: of the engine that was measured cold; the same layers stream here.
        target: the model.
        pack: its weights.
        others: baselines, which read from the page cache what it has.
        rows: of a pass.
    """
    placement = plan.placement
    alone = replace(plan, draft=None, work=replace(plan.work, draft_rows=0))
    placements = {
        OWN: replace(placement, in_ram=placement.streamed),
        RESIDENT: replace(placement, resident=tuple(range(placement.num_layers)), in_ram=(), slots=0),
    }
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(open_engine(target, None, replace(alone, placement=each), (pack, None)))
            for name, each in placements.items()
        }
        own = {name: partial(_own_pass, engine, rows) for name, engine in engines.items()}
        yield {**own, **{name: timer for name, timer in others.items() if name != OWN}}


def _own_pass(engine: Engine, rows: int) -> tuple[float, int | None]:
    from specchat.engine.measuring import measure_pass

    timed = measure_pass(engine, rows)
    return timed.pass_s, timed.streamed_bytes or None


def check_baselines(names: Sequence[str], draft: ModelSource | None) -> None:
    """Refuses a baseline that lacks what it needs.

    Raises:
        UsageError: assisted generation without a draft.
    """
    if "assisted" in names and draft is None:
        raise UsageError("the baseline 'assisted' needs a draft", hint="give one with --draft")


def left_out(names: Sequence[str], plan: Plan) -> dict[str, str]:
    """Baselines that would run other weights than those that are measured, and why; the others still run.

    transformers loads a checkpoint as it is: unrounded where `--quant` rounds it, and one that comes quantized not at
    all, or by other formulas than ours.
    """
    reasons = {
        "accelerate": _why_not("target", plan.quant, "--quant"),
        "assisted": _why_not("target", plan.quant, "--quant") or _why_not("draft", plan.draft_quant, "--draft-quant"),
    }
    return {name: why for name in names if (why := reasons.get(name)) is not None}


def _why_not(model: str, quant: str, option: str) -> str | None:
    if quant == "none":
        return None
    if quant in LOWER_QUANTS:
        return (
            f"transformers would run the {model}'s unrounded weights, not {quant}; compare with plain, or {option} none"
        )
    return f"the {model} comes quantized ({quant}), which transformers cannot offload as it is; compare with plain"


@contextmanager
def load(
    plan: Plan,
    target: ModelSource,
    draft: ModelSource | None,
    packs: tuple[Pack | None, Pack | None],
    baselines: Sequence[str],
    *,
    warm_up: Callable[[EngineSystem], None],
    evict: Callable[[], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Iterator[Loaded]:
    """Loads the engine and the baselines, and closes them.

    Args:
        plan: of the engine; the baselines keep the same layers on the device.
        target: the model.
        draft: its draft, or None.
        packs: packs of target and draft, None where a model's own files are read.
        baselines: plain, accelerate, assisted.
        warm_up: run with our own system before any baseline is there, so that our memory is ours.
        evict: takes the weights out of the page cache; then run before every pass of every system.
        say: told what is being loaded.
        warn: told what the system refused.
    """
    from specchat.engine import measuring

    with ExitStack() as stack:
        say(f"loading {target.name}")
        engine = stack.enter_context(open_engine(target, draft, plan, packs, warn))
        own = _own_system(OWN, engine, evict)
        warm_up(own)
        memory_before = engine.memory()
        systems: list[System] = [own]
        offloaded: dict[str, OffloadedModel] = {}
        for name in baselines:
            if name == "plain":
                systems.append(_own_system(name, engine, evict))
                continue
            say(f"loading {target.name} for {name}")
            offloaded[name] = stack.enter_context(_offloaded(plan, target, draft if name == "assisted" else None))
            systems.append(OffloadedSystem(name, offloaded[name], evict))

        @cache
        def margin(context: tuple[int, ...], sampling: Sampling) -> tuple[float, float]:
            found = measuring.margin_after(engine, context, sampling)
            return found.margin, found.scale

        yield Loaded(engine, tuple(systems), offloaded, margin, memory_before)


def _own_system(name: str, engine: Engine, evict: Callable[[], None] | None) -> EngineSystem:
    from specchat.engine import measuring

    def between_passes() -> None:
        if evict is not None:
            evict()
            measuring.drop_prefetched(engine)

    return EngineSystem(
        name,
        engine,
        scope=nullcontext if name == OWN else partial(measuring.without_draft, engine),
        between_passes=between_passes,
    )


def _offloaded(plan: Plan, target: ModelSource, draft: ModelSource | None) -> OffloadedModel:
    from specchat.bench.baselines import OffloadedModel

    return OffloadedModel(
        target, dtype=plan.work.dtype, device=plan.work.device, resident=plan.placement.resident, draft=draft
    )
