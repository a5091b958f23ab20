"""Eviction from the page cache, raw reads, and rounds of passes."""

import json
import os
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import jsonschema
import pytest
from support.fake_engine import PLAN
from support.machines import MEASURED
from support.plans import changed

from specchat.bench import measure, report, tables
from specchat.bench.cold import RESIDENT, PassFiles, PassRounds, PassSeries, measure_rounds
from specchat.bench.records import OWN
from specchat.errors import SpecchatError
from specchat.hardware import disk

SIZE = 24 << 20
TMPFS = Path("/dev/shm")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(SIZE + 1000))  # the last page and the last chunk are partial
    if _kind(tmp_path) == "tmpfs":
        pytest.skip("the temporary folder is in memory")
    return path


def _kind(folder):
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [(point, kind) for point, kind in mounts if str(folder).startswith(point)]
    return max(inside, key=lambda mount: len(mount[0]))[1]


def test_evict_empties_the_cache_and_returns_the_resident_share(file):
    file.read_bytes()
    assert disk.resident_share([file]) > 0.99
    assert disk.evict([file]) < disk.MAX_RESIDENT_SHARE
    assert disk.resident_share([file]) < disk.MAX_RESIDENT_SHARE


def test_evict_fails_on_files_that_stay_in_memory(monkeypatch):
    if not TMPFS.is_dir() or _kind(TMPFS) != "tmpfs":
        pytest.skip("no tmpfs here")
    monkeypatch.setattr(disk, "_PATIENCE_S", 0.2)
    path = TMPFS / f"specchat-test-{os.getpid()}"
    path.write_bytes(bytes(1 << 20))
    try:
        with pytest.raises(SpecchatError, match="page cache"):
            disk.evict([path])
    finally:
        path.unlink()


@pytest.mark.parametrize("direct", [True, False])
def test_raw_reads(file, direct):
    disk.evict([file])
    read = disk.read_raw([file], direct=direct)
    assert read.num_bytes == SIZE + 1000
    assert read.bytes_per_s == read.num_bytes / read.seconds
    if direct and read.direct:
        assert disk.resident_share([file]) < 0.1  # O_DIRECT went past the cache
    if not direct:
        assert disk.resident_share([file]) > 0.99


def test_raw_reads_fall_back_without_direct_io(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(bytes(5000))
    real = os.open

    def refuse(name, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert disk.read_raw([path], direct=True).direct is False


def test_rounds_alternate_order_and_drop_the_warm_up(file):
    order = []

    def system(name, num_bytes):
        def time_pass():
            order.append((name, disk.resident_share([file]) < 0.01))
            return float(len(order)), num_bytes

        return time_pass

    systems = {"specchat": system("specchat", 1000), "accelerate": system("accelerate", None)}
    rounds = measure_rounds(
        PassFiles([file], [file]),
        systems,
        rows=64,
        cold=True,
        direct=True,
        cancel=Event(),
        report=lambda _: None,
        num_rounds=3,
    )
    there, back = [("specchat", True), ("accelerate", True)], [("accelerate", True), ("specchat", True)]
    assert order == [*back, *there, *back, *there]
    assert rounds.systems["specchat"].seconds == (3.0, 6.0, 7.0)
    assert rounds.systems["specchat"].pass_s == 6.0
    assert rounds.systems["accelerate"].bytes_per_s == 1000 / 5.0
    assert len(rounds.raw.seconds) == 3
    assert rounds.raw.streamed_bytes == SIZE + 1000
    assert rounds.resident_share < disk.MAX_RESIDENT_SHARE


@pytest.mark.parametrize(
    ("pinning_works", "expected"), [(True, "h2d_pinned_bytes_per_s"), (False, "h2d_pageable_bytes_per_s")]
)
def test_link_rate_to_a_gpu_comes_from_the_probe(monkeypatch, pinning_works, expected):
    measured = replace(MEASURED, device="cuda:0", pinning_works=pinning_works)
    plan = changed(PLAN, device="cuda:0", in_ram=PLAN.placement.streamed)
    monkeypatch.setattr(measure, "find_machine", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(measure, "remembered", lambda folder, hardware, machine, device: measured)
    assert measure._link_rate(SimpleNamespace(plan=plan)) == getattr(measured.links, expected) > 0
    assert measure._link_rate(SimpleNamespace(plan=changed(plan, resident=range(4)))) is None  # nothing streams
    assert measure.probed_link(changed(plan, in_ram=()), measured) is None  # disk streaming has no single rate
    assert measure.probed_link(plan, None) is None


def test_interrupted_rounds_are_none(file):
    cancel = Event()
    cancel.set()
    files = PassFiles([file], [file])
    assert measure_rounds(files, {}, rows=1, cold=True, direct=True, cancel=cancel, report=lambda _: None) is None


def test_report_holds_cold_and_page_cache_passes():
    raw = PassSeries((1.0, 2.0, 4.0), 300)
    cold = PassRounds(64, True, raw, True, {OWN: PassSeries((2.5, 2.0, 9.0), 300)}, 0.0)
    systems = {OWN: PassSeries((1.0, 1.1, 1.2), 300), RESIDENT: PassSeries((1.0,), 0), "accelerate": raw}
    warm = PassRounds(64, False, raw, False, systems, 1.0)
    schema = json.loads((Path(report.__file__).parent / "schema.json").read_text())
    schema |= {"$ref": "#/$defs/rounds"}
    for name in ("properties", "required", "additionalProperties", "type"):
        schema.pop(name, None)
    alone, both = report.disk_passes_object(cold), report.disk_passes_object(cold, warm)
    for found in (alone, both):
        jsonschema.validate(found, schema)
    assert alone["page_cache"] is None and alone["own_over_resident"] is None
    assert both["systems"][0]["utilisation"] == 0.8
    assert both["page_cache"]["own_over_resident"] == 1.1
    resident = both["page_cache"]["systems"][1]
    assert (resident["name"], resident["utilisation"]) == (RESIDENT, None)  # it streams nothing
    assert "1.10x the time of a pass with every layer in memory" in tables._disk_passes(both["page_cache"]).note
