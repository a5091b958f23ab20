"""One plan measured from loading to figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from specchat.bench import identity, setup
from specchat.bench.cold import PAIRS, Files, PassRounds, measure_rounds
from specchat.bench.generation import CountedOutcome
from specchat.bench.prompts import Question
from specchat.bench.records import OWN, Measurement, Settings
from specchat.bench.report import Baseline
from specchat.bench.runner import Progress, Runner
from specchat.bench.systems import System
from specchat.errors import PromptTooLongError
from specchat.hardware.disk import evict, read_raw
from specchat.hardware.machine import Measured
from specchat.hardware.probe import find_hardware, find_machine, remembered
from specchat.hardware.system import available_ram_bytes
from specchat.paths import cache_folder
from specchat.records.model import ModelSource
from specchat.records.plan import Plan
from specchat.units import GIB

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.models.packs.pack import Pack

# Rows of a pass by itself when there is no tree to take the number from.
_DEFAULT_ROWS = 64
# Enough to know a disk's rate by; a large model's files take minutes to read.
_LINK_BYTES = 2 * GIB
_SPARE_RAM_BYTES = 4 * GIB


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        plan: of the engine.
        target, draft: the models.
        tokenizer: the target's.
        stop_ids: tokens that end an answer.
        questions: to be asked.
        settings: how.
        baselines: names.
        cold: every pass starts from an empty page cache.
        passes: passes by themselves are measured, too.
        packs: packs of target and draft, None where a model's own files are read.
        files: what passes read.
        warn: told what the system refused.
        counts_memory: what generating takes beside weights is counted in one answer that is not timed.
    """

    plan: Plan
    target: ModelSource
    draft: ModelSource | None
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    questions: Sequence[Question]
    settings: Settings
    baselines: Sequence[str]
    cold: bool
    passes: bool
    packs: tuple[Pack | None, Pack | None]
    files: Files
    warn: Callable[[str], None]
    counts_memory: bool = False

    @property
    def reads_past_cache(self) -> bool:
        """Whether our own passes read the disk itself."""
        return "disk" in self.plan.placement.tiers and self.packs[0] is not None


def measure(job: Job, cancel: Event, report: Callable[[Progress], None]) -> CountedOutcome:
    """Loads everything, asks everything, compares, and lets go of everything."""

    def say(what: str) -> None:
        report(Progress(0, 0, None, what))

    def make_runner(systems: Sequence[System]) -> Runner:
        return Runner(
            systems,
            job.tokenizer,
            stop_ids=job.stop_ids,
            ctx=job.plan.work.ctx,
            settings=job.settings,
            cancel=cancel,
            passes_after=_passes_after(job),
            report=report,
        )

    def warm_up(system: System) -> None:
        make_runner([system]).warm_up(job.questions[0])

    evicts = partial(_evict, job.files.every) if job.cold else None
    with setup.load(
        job.plan,
        job.target,
        job.draft,
        job.packs,
        job.baselines,
        warm_up=warm_up,
        evict=evicts,
        say=say,
        warn=job.warn,
    ) as loaded:
        runner = make_runner(loaded.systems)
        generation_peak_bytes = _warmed_up(runner, loaded, job)
        measurement = runner.run(job.questions)
        _check_not_empty(measurement, job)
        if loaded.engine.draft_lost is not None:
            job.warn(loaded.engine.draft_lost)
        baselines = tuple(_compared(loaded, system, measurement, job.plan) for system in loaded.systems[1:])
        passes = _passes(job, loaded, cancel, say) if job.passes else None
        pack = _pack_for_page_cache(job)
        page_cache = None if pack is None else _page_cache_passes(job, pack, loaded, cancel, say)
        is_there = {
            "answers": not measurement.partial,
            "cold passes" if job.cold else "passes by themselves": passes is not None or not job.passes,
            "passes from the page cache": page_cache is not None or pack is None,
        }
        return CountedOutcome(
            plan=job.plan,
            load_s=loaded.engine.load_s,
            measurement=replace(
                measurement, missing=tuple(what for what, has_come in is_there.items() if not has_come)
            ),
            baselines=baselines,
            memory=loaded.memory(),
            link_bytes_per_s=passes.raw.bytes_per_s if passes is not None else _link(job),
            disk_passes=passes,
            page_cache_passes=page_cache,
            generation_peak_bytes=generation_peak_bytes,
        )


def _passes_after(job: Job) -> dict[str, int]:
    """Passes of each system that follow the answers, our own standing for as long raw reads as well; at the most."""
    kinds = (2 if _pack_for_page_cache(job) is not None else 1) if job.passes else 0
    rounds = kinds * (PAIRS + 1)
    return {OWN: 2 * rounds} | ({"accelerate": rounds} if "accelerate" in job.baselines else {})


def _warmed_up(runner: Runner, loaded: setup.Loaded, job: Job) -> int | None:
    """Asks what is not timed; what that took beside weights, if it is to be counted."""
    if not job.counts_memory:
        runner.warm_up(job.questions[0])
        return None
    from specchat.engine.measuring import GenerationMemory

    with GenerationMemory(loaded.engine) as counted:
        runner.warm_up(job.questions[0])
    return int(counted.peak_bytes)


def _check_not_empty(measurement: Measurement, job: Job) -> None:
    if not measurement.runs and not measurement.partial:
        raise PromptTooLongError(
            f"none of the {len(job.questions)} questions fits into the context of {job.plan.work.ctx} tokens "
            f"with an answer of {job.settings.max_tokens}",
            hint="a larger --ctx, a smaller --max-tokens, or other --prompts",
        )


def _evict(files: Sequence[Path]) -> None:
    evict(files)


def _link(job: Job) -> float | None:
    """What the link gives alone: on the CPU what merely reading some of the weights does, else what a probe found."""
    plan = job.plan
    if not plan.placement.streamed:
        return None
    if plan.work.device != "cpu":
        folder = cache_folder()
        return probed_link(
            plan, remembered(folder, find_hardware(folder), find_machine(plan.work.device), plan.work.device)
        )
    some: list[Path] = []
    for file in job.files.own:
        if not some or sum(each.stat().st_size for each in some) < _LINK_BYTES:
            some.append(file)
    return read_raw(some, direct=job.reads_past_cache).bytes_per_s


def probed_link(plan: Plan, measured: Measured | None) -> float | None:
    """Bytes/s to a GPU from where the streamed layers lie, as the last `specchat probe` measured them.

    None before any probe, and for layers that come from the disk first: no single rate is theirs.
    """
    if measured is None or "disk" in plan.placement.tiers:
        return None
    links = measured.links
    return links.h2d_pageable_bytes_per_s if measured.pinning_works is False else links.h2d_pinned_bytes_per_s


def _compared(loaded: setup.Loaded, system: System, measurement: Measurement, plan: Plan) -> Baseline:
    found = identity.compare(
        measurement.of(OWN),
        measurement.of(system.name),
        keyed=system.is_keyed,
        dtype=plan.work.dtype,
        margin=loaded.margin,
    )
    return Baseline(system.name, found)


def _passes(job: Job, loaded: setup.Loaded, cancel: Event, say: Callable[[str], None]) -> PassRounds | None:
    """Rounds of passes; None when interrupted."""
    rows = job.plan.work.tree_budget or _DEFAULT_ROWS
    return measure_rounds(
        job.files,
        loaded.pass_timers(rows),
        rows=rows,
        cold=job.cold,
        direct=job.cold or job.reads_past_cache,
        cancel=cancel,
        report=say,
    )


def _pack_for_page_cache(job: Job) -> Pack | None:
    """What cold passes are followed by passes from the page cache of; None for no such passes.

    Without --cold the passes are such already, and memory must have room for the weights in the cache and beside it.
    """
    pack = job.packs[0]
    return pack if job.cold and pack is not None and _has_room(pack) else None


def _page_cache_passes(
    job: Job, pack: Pack, loaded: setup.Loaded, cancel: Event, say: Callable[[str], None]
) -> PassRounds | None:
    """The same passes from the page cache, beside ones with every layer in memory; None when interrupted."""
    if cancel.is_set():
        return None
    rows = job.plan.work.tree_budget or _DEFAULT_ROWS
    say(f"loading {job.target.name} into memory")
    with setup.page_cache_timers(job.plan, job.target, pack, loaded.pass_timers(rows), rows) as timers:
        return measure_rounds(job.files, timers, rows=rows, cold=False, direct=False, cancel=cancel, report=say)


def _has_room(pack: Pack) -> bool:
    """Whether memory holds the weights twice, in the page cache and beside it, and a reserve for everything else."""
    return 2 * pack.nbytes + _SPARE_RAM_BYTES <= available_ram_bytes()
