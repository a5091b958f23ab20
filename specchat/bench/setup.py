"""Loads the measured systems of a plan; each baseline keeps the same layers on the device as specchat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from specchat.bench.cold import RESIDENT, TimePass
from specchat.bench.identity import MarginFunction
from specchat.bench.llama_cpp import LLAMA_CPP, WITH_DRAFT, LlamaSystem, find_llama, start_llama
from specchat.bench.llama_process import LlamaModel
from specchat.bench.records import LAYERS, OWN
from specchat.bench.systems import EngineSystem, OffloadedSystem, System
from specchat.errors import UsageError
from specchat.loading.engine import open_engine
from specchat.loading.request import WorkersChoice
from specchat.models.checkpoint.gguf import listed_files
from specchat.records.generation import Sampling
from specchat.records.model import LOWER_QUANTS, ModelSource
from specchat.records.plan import Plan
from specchat.records.usage import MemoryReport

if TYPE_CHECKING:
    from specchat.bench.baselines import OffloadedModel
    from specchat.engine.engine import Engine
    from specchat.models.packs.pack import Pack


@dataclass(frozen=True)
class LoadedSystems:
    """The loaded systems of a measurement.

    Attributes:
        engine: engine of specchat.
        systems: specchat, then the baselines.
        offloaded: models of the offloading baselines, by name.
        margin: function that returns the margin of the target's best next token over the second best.
        memory_before: memory in use after specchat's warm-up, before any baseline was loaded.
    """

    engine: Engine
    systems: tuple[System, ...]
    offloaded: dict[str, OffloadedModel]
    margin: MarginFunction
    memory_before: MemoryReport

    def memory(self) -> MemoryReport:
        """Return the memory of specchat without the baselines.

        Baselines run in the same process, so its later peaks include theirs. Use the peaks from before they were
        loaded, except for the device's peak on the CPU, which is counted item by item.
        """
        now = self.engine.memory()
        if not self.offloaded:
            return now
        device_peak = (
            now.device_peak_bytes if self.engine.plan.work.device == "cpu" else self.memory_before.device_peak_bytes
        )
        return replace(self.memory_before, device_peak_bytes=device_peak)

    def pass_timers(self, rows: int) -> dict[str, TimePass]:
        """Return the timers of one pass of `rows` rows by system name: specchat, then accelerate if loaded."""

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
    """Yield timers of passes with the files in the page cache: streamed, with all layers resident, and of baselines.

    Args:
        plan: plan of the engine that was measured cold; the same layers stream here.
        target: target model.
        pack: pack of the target.
        others: timers of all systems; those of the baselines are kept.
        rows: number of rows of a pass.
    """
    placement = plan.placement
    alone = replace(plan, draft=None, retrieval=False, work=replace(plan.work, draft_rows=0))
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


def check_baselines(names: Sequence[str], target: ModelSource, draft: ModelSource | None) -> None:
    """Refuse assisted generation without a draft, and llama.cpp without its files or its program.

    Raises:
        UsageError: `assisted` was chosen without a draft, or llama.cpp for a model or a draft that is no GGUF file.
        NotAvailableError: llama.cpp was chosen and is not installed.
    """
    chosen = [name for name in names if name in LLAMA_CPP]
    if chosen:
        if listed_files(target.path) is None:
            raise UsageError(f"the baseline '{chosen[0]}' runs GGUF files, and {target.name} is none")
        if WITH_DRAFT in chosen and _gguf_draft(draft) is None:
            raise UsageError(
                f"the baseline '{WITH_DRAFT}' needs a draft that is a GGUF file", hint="use --draft x.gguf"
            )
        find_llama(chosen)
    if "assisted" in names and (draft is None or draft.part):
        raise UsageError("the baseline 'assisted' needs a draft model", hint="name one with --draft")


_ON_ONE_DEVICE = "it runs on one device; use --baseline plain or --device"


def left_out(names: Sequence[str], plan: Plan) -> dict[str, str]:
    """Return the baselines that would show nothing, with the reason for each.

    Whole layers are compared with single experts only. transformers ignores `--quant` and loads full-precision
    weights. It cannot offload a pre-quantized checkpoint, or dequantizes it by other formulas than specchat. Other
    programs run on one device.
    """
    if plan.devices:
        return {name: _ON_ONE_DEVICE for name in names if name != "plain"}
    reasons = {
        LAYERS: None if plan.experts is not None else "the plan reads no single experts",
        "accelerate": _why_not("target", plan.quant, "--quant"),
        "assisted": _why_not("target", plan.quant, "--quant") or _why_not("draft", plan.draft_quant, "--draft-quant"),
    }
    return {name: why for name in names if (why := reasons.get(name)) is not None}


def _why_not(model: str, quant: str, option: str) -> str | None:
    if quant == "none":
        return None
    if quant in LOWER_QUANTS:
        return (
            f"transformers would run the {model}'s full-precision weights, not {quant}; "
            f"use --baseline plain or {option} none"
        )
    return f"the {model} is pre-quantized ({quant}), and transformers cannot offload it; use --baseline plain"


def _gguf_draft(draft: ModelSource | None) -> Path | None:
    """Return the file of a draft model that llama.cpp reads too; None for other drafts."""
    files = None if draft is None or draft.part else listed_files(draft.path)
    return None if files is None else files[0]


@dataclass(frozen=True)
class WholeLayers:
    """What the baseline of whole layers runs.

    Attributes:
        plan: best plan that streams whole layers in the same memory.
        draft: draft model, or None.
        packs: packs of target and draft; None for a model whose own files are read.
    """

    plan: Plan
    draft: ModelSource | None
    packs: tuple[Pack | None, Pack | None]


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
    limit_bytes: int | None = None,
    layers: WholeLayers | None = None,
    workers: WorkersChoice | None = None,
    cancel: Event | None = None,
    say: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Iterator[LoadedSystems]:
    """Load the engine and the baselines, and close them at the end.

    Args:
        plan: plan of the engine; the baselines keep the same layers on the device.
        target: target model.
        draft: draft model, or None.
        packs: packs of target and draft; None for a model whose own files are read.
        baselines: names of the baselines: plain, layers, accelerate, assisted, and those of `LLAMA_CPP`.
        warm_up: warms specchat up before any baseline is loaded, so that its memory can be read alone.
        evict: evicts the weights from the page cache before every pass of every system; None for no eviction.
        limit_bytes: limit of memory and page cache of llama.cpp; None for no limit.
        layers: plan and packs of the baseline of whole layers; None without this baseline.
        workers: machines that compute layers of the target beside this one.
        cancel: stops waiting for llama.cpp once set.
        say: receives a line for each model that is loaded.
        warn: receives one-line warnings.
    """
    from specchat.engine import measuring

    with ExitStack() as stack:
        say(f"loading {target.name}")
        engine = stack.enter_context(open_engine(target, draft, plan, packs, warn, workers=workers))
        own = _own_system(OWN, engine, evict)
        warm_up(own)
        memory_before = engine.memory()
        systems: list[System] = [own]
        offloaded: dict[str, OffloadedModel] = {}
        for name in baselines:
            if name == "plain":
                systems.append(_own_system(name, engine, evict))
                continue
            if name == LAYERS:
                assert layers is not None
                say(f"loading {target.name} for {name}")
                whole = stack.enter_context(open_engine(target, layers.draft, layers.plan, layers.packs, warn))
                systems.append(_own_system(name, whole, evict))
                continue
            if name in LLAMA_CPP:
                say(f"loading {target.name} for {name} ({find_llama([name])})")
                model = _llama_model(plan, target, draft if name == WITH_DRAFT else None, limit_bytes)
                server = stack.enter_context(start_llama(name, model, cancel or Event()))
                systems.append(LlamaSystem(name, server))
                continue
            say(f"loading {target.name} for {name}")
            offloaded[name] = stack.enter_context(_offloaded(plan, target, draft if name == "assisted" else None))
            systems.append(OffloadedSystem(name, offloaded[name], evict))

        @cache
        def margin(context: tuple[int, ...], sampling: Sampling) -> tuple[float, float]:
            found = measuring.margin_after(engine, context, sampling)
            return found.margin, found.scale

        yield LoadedSystems(engine, tuple(systems), offloaded, margin, memory_before)


def _own_system(name: str, engine: Engine, evict: Callable[[], None] | None) -> EngineSystem:
    from specchat.engine import measuring

    def between_passes() -> None:
        if evict is not None:
            evict()
            measuring.drop_prefetched(engine)

    return EngineSystem(
        name,
        engine,
        scope=nullcontext if name in (OWN, LAYERS) else partial(measuring.without_draft, engine),
        between_passes=between_passes,
    )


def _llama_model(plan: Plan, target: ModelSource, draft: ModelSource | None, limit_bytes: int | None) -> LlamaModel:
    from specchat.engine import measuring

    files = listed_files(target.path)
    assert files is not None, "checked by `check_baselines`"
    return LlamaModel(
        file=files[0],
        ctx=plan.work.ctx,
        threads=measuring.num_threads(),
        on_cpu=plan.work.device == "cpu",
        draft=_gguf_draft(draft),
        limit_bytes=limit_bytes,
    )


def _offloaded(plan: Plan, target: ModelSource, draft: ModelSource | None) -> OffloadedModel:
    from specchat.bench.baselines import OffloadedModel

    return OffloadedModel(
        target, dtype=plan.work.dtype, device=plan.work.device, resident=plan.placement.resident, draft=draft
    )
