"""The measurement of one plan, from loading to the outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from specchat.bench import identity, setup
from specchat.bench.cold import PAIRS, PassFiles, PassRounds, measure_rounds
from specchat.bench.generation import CountedOutcome
from specchat.bench.prompts import Question
from specchat.bench.records import OWN, BenchSettings, Measurement
from specchat.bench.report import Baseline
from specchat.bench.runner import Progress, Runner
from specchat.bench.systems import System
from specchat.errors import PromptTooLongError
from specchat.hardware.disk import evict, read_raw
from specchat.hardware.machine import Measured
from specchat.hardware.probe import find_hardware, find_machine, remembered
from specchat.hardware.system import available_ram_bytes
from specchat.loading.request import WorkersChoice
from specchat.paths import cache_folder
from specchat.records.model import ModelSource
from specchat.records.plan import Plan
from specchat.units import GIB

if TYPE_CHECKING:
    from specchat.models.hf.tokenizer import Tokenizer
    from specchat.models.packs.pack import Pack

# Rows of a single pass if the plan has no tree.
_DEFAULT_ROWS = 64
# Enough bytes to measure a disk's rate; reading all files of a large model takes minutes.
_LINK_BYTES = 2 * GIB
_SPARE_RAM_BYTES = 4 * GIB


@dataclass(frozen=True)
class Job:
    """The plan, the questions and the conditions of one measurement.

    Attributes:
        plan: plan of the engine.
        target, draft: models; the draft may be None.
        tokenizer: tokenizer of the target.
        stop_ids: tokens that end an answer.
        questions: questions to ask.
        settings: settings of the measurement.
        baselines: names of the baselines.
        cold: whether every pass starts with an empty page cache.
        passes: whether to time single passes too.
        packs: packs of target and draft; None for a model whose own files are read.
        files: files that passes read.
        warn: receives one-line warnings.
        counts_memory: whether to count generation memory in one answer that is not timed.
        layers: plan and packs of the baseline of whole layers; None without this baseline.
        workers: machines that compute layers of the target beside this one.
    """

    plan: Plan
    target: ModelSource
    draft: ModelSource | None
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    questions: Sequence[Question]
    settings: BenchSettings
    baselines: Sequence[str]
    cold: bool
    passes: bool
    packs: tuple[Pack | None, Pack | None]
    files: PassFiles
    warn: Callable[[str], None]
    counts_memory: bool = False
    layers: setup.WholeLayers | None = None
    workers: WorkersChoice | None = None

    @property
    def reads_past_cache(self) -> bool:
        """Whether specchat's passes read the disk past the page cache."""
        return "disk" in self.plan.placement.tiers and self.packs[0] is not None


def measure(job: Job, cancel: Event, report: Callable[[Progress], None]) -> CountedOutcome:
    """Load the systems, ask all questions, compare the answers, time single passes, unload, and read the disk."""
    from specchat.engine.device import release_memory

    found = _measure_systems(job, cancel, report)
    if found.disk_passes is not None:
        return found
    release_memory()  # the buffers of this read may need it
    return replace(found, link_bytes_per_s=_link_rate(job))


def _measure_systems(job: Job, cancel: Event, report: Callable[[Progress], None]) -> CountedOutcome:

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

    is_limited = job.settings.limit_memory_bytes is not None

    def warm_up(system: System) -> None:
        make_runner([system]).warm_up(job.questions[0])
        if is_limited:  # pages left from loading would be free memory for the baselines
            _evict(job.files.every)

    evicts = partial(_evict, job.files.every) if job.cold else None
    if is_limited:  # a page is charged to the group that reads it first
        _evict(job.files.every)
    with setup.load(
        job.plan,
        job.target,
        job.draft,
        job.packs,
        job.baselines,
        warm_up=warm_up,
        evict=evicts,
        limit_bytes=job.settings.limit_memory_bytes,
        layers=job.layers,
        workers=job.workers,
        cancel=cancel,
        say=say,
        warn=job.warn,
    ) as loaded:
        runner = make_runner(loaded.systems)
        generation_peak_bytes = _warm_up(runner, loaded, job)
        measurement = runner.run(job.questions)
        _check_not_empty(measurement, job)
        if loaded.engine.draft_lost is not None:
            job.warn(loaded.engine.draft_lost)
        baselines = tuple(_compare(loaded, system, measurement, job.plan) for system in loaded.systems[1:])
        passes = _passes(job, loaded, cancel, say) if job.passes else None
        pack = _pack_for_page_cache(job)
        page_cache = None if pack is None else _page_cache_passes(job, pack, loaded, cancel, say)
        is_complete = {
            "answers": not measurement.partial,
            "cold passes" if job.cold else "single passes": passes is not None or not job.passes,
            "passes from the page cache": page_cache is not None or pack is None,
        }
        return CountedOutcome(
            plan=job.plan,
            load_s=loaded.engine.load_s,
            measurement=replace(
                measurement, missing=tuple(what for what, complete in is_complete.items() if not complete)
            ),
            baselines=baselines,
            memory=loaded.memory(),
            link_bytes_per_s=passes.raw.bytes_per_s if passes is not None else None,
            disk_passes=passes,
            page_cache_passes=page_cache,
            generation_peak_bytes=generation_peak_bytes,
        )


def _passes_after(job: Job) -> dict[str, int]:
    """Return the maximum number of single passes per system; a raw read counts as a pass of specchat."""
    kinds = (2 if _pack_for_page_cache(job) is not None else 1) if job.passes else 0
    rounds = kinds * (PAIRS + 1)
    return {OWN: 2 * rounds} | ({"accelerate": rounds} if "accelerate" in job.baselines else {})


def _warm_up(runner: Runner, loaded: setup.LoadedSystems, job: Job) -> int | None:
    """Ask for one short answer of each system; return its peak generation memory in bytes if the job counts it."""
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
            hint="use a larger --ctx, a smaller --max-tokens, or other --prompts",
        )


def _evict(files: Sequence[Path]) -> None:
    evict(files)


def _link_rate(job: Job) -> float | None:
    """Return the link's own rate in bytes/s: raw reads of some weights on the CPU, else the rate of the last probe."""
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
    """Return the host-to-device rate for the streamed layers in bytes/s, as the last `specchat probe` measured it.

    Return None before any probe, and for layers that come from disk, because they have no single rate.
    """
    if measured is None or "disk" in plan.placement.tiers:
        return None
    links = measured.links
    return links.h2d_pageable_bytes_per_s if measured.pinning_works is False else links.h2d_pinned_bytes_per_s


def _compare(loaded: setup.LoadedSystems, system: System, measurement: Measurement, plan: Plan) -> Baseline:
    found = identity.compare(
        measurement.of(OWN),
        measurement.of(system.name),
        keyed=system.is_keyed,
        dtype=plan.work.dtype,
        margin=loaded.margin,
    )
    return Baseline(system.name, found)


def _passes(job: Job, loaded: setup.LoadedSystems, cancel: Event, say: Callable[[str], None]) -> PassRounds | None:
    """Time rounds of single passes; return None if interrupted."""
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
    """Return the pack to time from the page cache too; None if memory cannot hold the weights twice.

    Also return None without --cold, because all passes then read from the page cache anyway.
    """
    pack = job.packs[0]
    return pack if job.cold and pack is not None and _has_room(pack) else None


def _page_cache_passes(
    job: Job, pack: Pack, loaded: setup.LoadedSystems, cancel: Event, say: Callable[[str], None]
) -> PassRounds | None:
    """Time passes from the page cache and passes with every layer in memory; return None if interrupted."""
    if cancel.is_set():
        return None
    rows = job.plan.work.tree_budget or _DEFAULT_ROWS
    say(f"loading {job.target.name} into memory")
    with setup.page_cache_timers(job.plan, job.target, pack, loaded.pass_timers(rows), rows) as timers:
        return measure_rounds(job.files, timers, rows=rows, cold=False, direct=False, cancel=cancel, report=say)


def _has_room(pack: Pack) -> bool:
    """Return whether memory holds the weights twice, in the page cache and outside, with a reserve for the rest."""
    return 2 * pack.nbytes + _SPARE_RAM_BYTES <= available_ram_bytes()
