"""Rates agree with an independent measurement, are kept, and leave no files behind."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace

import pytest
import torch
from support.machines import MEASURED, hardware

from specchat.hardware import links, store
from specchat.hardware import probe as probing
from specchat.hardware.disk import evict
from specchat.hardware.machine import Gpu, GpuSurvey, PcieLink, TorchBuild

MIB = 1 << 20


def test_saved_rates_load_unchanged(tmp_path):
    folder = tmp_path / "cache"
    assert store.load(folder, "k") is None
    store.save(folder, "k", MEASURED)
    assert store.load(folder, "k") == MEASURED and store.load(folder, "other") is None
    store.save(folder, "k", replace(MEASURED, pcie_under_load=None))
    assert store.load(folder, "k").pcie_under_load is None
    assert [path.name for path in folder.iterdir()] == ["probe-k.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"links": {}}', '{"pcie_under_load": 1}'])
def test_a_damaged_file_loads_as_none(tmp_path, text):
    (tmp_path / "probe-k.json").write_text(text)
    assert store.load(tmp_path, "k") is None


def test_the_key_changes_with_the_machine():
    gpu = Gpu("a", "GPU-1", 1, 1, None, "580", PcieLink())
    here = hardware(GpuSurvey((gpu,)))
    others = [
        hardware(GpuSurvey()),
        hardware(GpuSurvey((replace(gpu, uuid="GPU-2"),))),
        hardware(GpuSurvey((replace(gpu, driver="581"),))),
        hardware(here.survey, torch=TorchBuild("3", None)),
        hardware(here.survey, disk=replace(here.disk, path=here.disk.path / "x")),
        hardware(here.survey, cpu=replace(here.cpu, name="another")),
    ]
    keys = {store.key_of(each, "auto") for each in (here, *others)} | {store.key_of(here, "cpu")}
    assert len(keys) == len(others) + 2
    busy = hardware(here.survey, ram=replace(here.ram, available_bytes=1), disk=replace(here.disk, free_bytes=1))
    assert store.key_of(busy, "auto") == store.key_of(here, "auto")


@pytest.fixture
def quick(monkeypatch):
    """The same measurements with little of everything."""
    monkeypatch.setattr(links, "_DISK_BYTES", 64 * MIB)
    monkeypatch.setattr(links, "_RAM_BYTES", 64 * MIB)
    monkeypatch.setattr(links, "_MATRIX", 256)
    monkeypatch.setattr(links, "_MATMUL_S", 0.001)


def test_probe_measures_once_and_reuses_the_rates(quick, tmp_path):
    told, begin = [], time.perf_counter()
    first = probing.probe(tmp_path, "cpu", progress=lambda *what: told.append(what))
    took_s = time.perf_counter() - begin
    assert [step for _, step, _ in told] == [1, 2, 3, 4]
    found = first.measured.links
    assert found.ram_copy_bytes_per_s > 200 * MIB / took_s, "all of it took as long as copying alone"
    assert found.disk_read_bytes_per_s > 60 * MIB / took_s
    assert found.h2d_pinned_bytes_per_s is None and len(first.measured.matmul) == 5
    rates = zip(first.measured.matmul, first.measured.packed, strict=False)
    assert all(packed.rows == stored.rows and packed.flop_per_s >= stored.flop_per_s for stored, packed in rates)
    assert len(first.measured.packed) == (5 if torch.backends.mkldnn.is_available() else 0)
    told.clear()
    again = probing.probe(tmp_path, "cpu", progress=lambda *what: told.append(what))
    assert not told and again.measured == first.measured
    assert (
        probing.probe(tmp_path, "cpu", refresh=True, progress=lambda *what: told.append(what)).measured.links != found
    )
    assert told
    assert all(path.suffix == ".json" for path in tmp_path.iterdir()), "files of measurements are removed"


def test_an_unwritable_folder_leaves_the_disk_rate_out(quick, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    report = probing.probe(blocked / "cache", "cpu")
    assert report.measured.links.disk_read_bytes_per_s is None
    assert [each.level for each in report.verdicts if each.topic == "disk read"] == ["warn"]


def test_existing_weight_files_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(links, "_DISK_BYTES", 4 * MIB)
    pack = tmp_path / "packs" / "key"
    pack.mkdir(parents=True)
    (pack / "layer-00000.safetensors").write_bytes(os.urandom(4 * MIB))
    monkeypatch.setattr(links, "_written", None)  # would fail if it were called
    assert links.measure_disk_read(tmp_path).bytes_per_s > 0


def test_too_little_memory_gives_no_ram_rate():
    assert links.measure_ram_copy(100 * MIB) is None


@pytest.mark.slow
def test_rates_agree_with_an_independent_measurement(tmp_path):
    """Within 15%, medians of both, taken in turn; needs a machine that does nothing else."""
    disk, ram, own_disk, own_ram = [], [], [], []
    file = tmp_path / "independent"
    file.write_bytes(os.urandom(512 * MIB))
    for _ in range(5):
        own_disk.append(links.measure_disk_read(tmp_path / "cache").bytes_per_s)
        disk.append(_read_by_hand(file))
        own_ram.append(links.measure_ram_copy(8 << 30))
        ram.append(_copy_by_hand())
    print(f"\ndisk {statistics.median(own_disk) / 1e9:.2f}, by hand {statistics.median(disk) / 1e9:.2f} GB/s")
    print(f"RAM {statistics.median(own_ram) / 1e9:.2f}, by hand {statistics.median(ram) / 1e9:.2f} GB/s")
    assert statistics.median(own_disk) == pytest.approx(statistics.median(disk), rel=0.15)
    assert statistics.median(own_ram) == pytest.approx(statistics.median(ram), rel=0.15)


def _read_by_hand(file):
    """One thread for each half, one large unbuffered read after the other."""
    import mmap
    from concurrent.futures import ThreadPoolExecutor

    evict([file])
    half = file.stat().st_size // 2

    def read(index):
        buffer = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
        buffer.write(bytes(16 * MIB))
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        for start in range(index * half, (index + 1) * half, 16 * MIB):
            os.preadv(descriptor, [buffer], start)
        os.close(descriptor)

    with ThreadPoolExecutor(2) as pool:
        begin = time.perf_counter()
        list(pool.map(read, range(2)))
        return 2 * half / (time.perf_counter() - begin)


def _copy_by_hand():
    """torch's own copy on all processors, buffers of another size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        source, target = torch.ones(384 * MIB, dtype=torch.uint8), torch.zeros(384 * MIB, dtype=torch.uint8)
        seconds = []
        for _ in range(6):
            begin = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - begin)
        return source.nbytes / statistics.median(seconds[1:])
    finally:
        torch.set_num_threads(threads)
