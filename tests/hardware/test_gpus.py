"""A survey of NVML gives the right verdicts, and failures of the driver never raise."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from support import fake_nvml
from support.fake_nvml import GIB, Card, Driver
from support.machines import CUDA_TORCH, MEASURED, hardware

from specchat.compiler import can_build_modules
from specchat.hardware.machine import Gpu, GpuSurvey, Links, PcieLink, Platform, TorchBuild
from specchat.hardware.nvml import read_pcie, survey_gpus
from specchat.hardware.report import machine_object
from specchat.hardware.verdicts import judge, why_no_cuda


def verdicts(monkeypatch, driver, measured=MEASURED, **changes):
    fake_nvml.install(monkeypatch, driver)
    return judge(hardware(survey_gpus(Path("/nonexistent")), **changes), measured, {})


def only(found, topic):
    (verdict,) = [each for each in found if each.topic == topic]
    return verdict


def test_a_good_machine_gets_only_ok_verdicts(monkeypatch):
    found = verdicts(monkeypatch, Driver([Card()]))
    assert {each.level for each in found} == {"ok"} and not any(each.hint for each in found)
    assert "23.0 GiB of 24.0 GiB free" in only(found, "GPU").text
    assert only(found, "PCIe").text == "generation 4 of 4, x16 of x16 (under load)"


def test_two_cards_get_separate_verdicts(monkeypatch):
    fake_nvml.install(monkeypatch, Driver([Card(), Card("NVIDIA RTX A2000", "GPU-2", 6 * GIB, 6 * GIB, (8, 6))]))
    survey = survey_gpus()
    assert [gpu.uuid for gpu in survey.gpus] == ["GPU-1", "GPU-2"] and survey.cuda_version == (13, 0)
    assert survey.gpus[0] == Gpu(
        "NVIDIA GeForce RTX 4090", "GPU-1", 24 * GIB, 23 * GIB, "8.9", "580.65", PcieLink(1, 16, 4, 16)
    )
    pcie = [gpu["pcie"] for gpu in machine_object(hardware(survey), MEASURED)["gpus"]]
    assert [link["gen"] for link in pcie] == [4, 1]  # the first one's as seen under load


def test_a_narrow_link_is_a_warning(monkeypatch):
    found = verdicts(monkeypatch, Driver([Card(width=8)]), replace(MEASURED, pcie_under_load=(4, 8)))
    assert only(found, "PCIe").level == "warn" and "x8 of x16" in only(found, "PCIe").text
    assert "50%" in only(found, "PCIe").hint


def test_an_idle_link_of_a_lower_generation_is_ok(monkeypatch):
    found = verdicts(monkeypatch, Driver([Card(gen=1)]), replace(MEASURED, pcie_under_load=None))
    assert only(found, "PCIe").level == "ok" and "idle" in only(found, "PCIe").text
    slow = verdicts(monkeypatch, Driver([Card()]), replace(MEASURED, pcie_under_load=(3, 16)))
    assert only(slow, "PCIe").level == "warn"


def test_copies_slower_than_the_link_are_a_warning(monkeypatch):
    slow = replace(MEASURED, links=replace(MEASURED.links, h2d_pinned_bytes_per_s=7e9))
    assert only(verdicts(monkeypatch, Driver([Card()]), slow), "pinned to GPU").level == "warn"


def test_mig_instances_replace_their_card(monkeypatch):
    slices = [Card(f"NVIDIA A100 MIG {i}g", f"MIG-{i}", 10 * GIB, 9 * GIB) for i in (1, 2)]
    found = verdicts(monkeypatch, Driver([Card("NVIDIA A100", slices=slices)]))
    gpus = [each for each in found if each.topic == "GPU"]
    assert len(gpus) == 2 and all(each.level == "warn" and "MIG" in each.hint for each in gpus)
    assert all("10.0 GiB free" in each.text for each in gpus)


def test_unreported_values_are_left_out(monkeypatch):
    silent = Card(capability=None, gen=None, width=None, max_gen=None, max_width=None)  # as under WSL
    measured = replace(MEASURED, pcie_under_load=None)
    found = verdicts(monkeypatch, Driver([silent]), measured, platform=Platform("Linux", "5.15-WSL2", "3.12", wsl=True))
    assert not [each for each in found if each.topic == "PCIe"]
    assert only(found, "WSL").level == "warn" and ".wslconfig" in only(found, "WSL").hint


@pytest.mark.parametrize("driver", [Driver(init_error="Driver Not Loaded"), Driver(version_error="Unknown Error")])
def test_a_driver_that_does_not_run_is_a_trouble(monkeypatch, driver):
    found = verdicts(monkeypatch, driver, replace(MEASURED, device="cpu", gpu_uuid=None))
    assert only(found, "GPU").level == "warn" and only(found, "GPU").hint


def test_a_lost_card_does_not_hide_the_other(monkeypatch):
    found = verdicts(monkeypatch, Driver([Card(is_lost=True), Card()]))
    gpus = [each for each in found if each.topic == "GPU"]
    assert [each.level for each in gpus] == ["warn", "ok"] and "GPU 0" in gpus[0].text and "lost" in gpus[0].text


def test_a_missing_driver_differs_from_a_missing_card(monkeypatch, tmp_path):
    fake_nvml.install(monkeypatch, Driver(init_error="NVML Shared Library Not Found"))
    assert "no NVIDIA GPU" in survey_gpus(tmp_path).troubles[0].text
    for vendor, word in (("0x1002", "AMD"), ("0x10de", "driver does not run")):
        device = tmp_path / vendor
        device.mkdir()
        (device / "class").write_text("0x030000\n")
        (device / "vendor").write_text(f"{vendor}\n")
        assert word in survey_gpus(tmp_path).troubles[0].text


def test_nvml_is_shut_down(monkeypatch):
    import sys

    for driver in (Driver([Card()]), Driver([Card(is_lost=True)]), Driver(version_error="Unknown Error")):
        fake_nvml.install(monkeypatch, driver)
        survey_gpus()
        read_pcie("GPU-1")
        assert sys.modules["pynvml"].is_open == 0


def test_the_link_under_load_is_read_from_the_right_card(monkeypatch):
    fake_nvml.install(monkeypatch, Driver([Card(), Card(uuid="GPU-2", gen=4, width=8)]))
    assert read_pcie("GPU-2") == (4, 8) and read_pcie("GPU-3") is None
    fake_nvml.install(monkeypatch, Driver(init_error="Driver Not Loaded"))
    assert read_pcie("GPU-2") is None


@pytest.mark.parametrize(
    ("torch", "driver", "environment", "words"),
    [
        (TorchBuild("2.13.0+cpu", None), Driver([Card()]), {}, "without CUDA"),
        (TorchBuild("2.13.0+rocm", None, hip=True), Driver([Card()]), {}, "AMD"),
        (CUDA_TORCH, Driver([Card()], version="535.1", cuda=12020), {}, "supports CUDA up to 12.2"),
        (CUDA_TORCH, Driver([Card(capability=(7, 0))]), {}, "compute capability 7.0"),
        (CUDA_TORCH, Driver([Card()]), {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES"),
        (CUDA_TORCH, Driver(), {}, "shows no GPU"),
        (None, Driver([Card()]), {}, "not installed"),
    ],
)
def test_why_torch_cannot_use_a_card(monkeypatch, torch, driver, environment, words):
    fake_nvml.install(monkeypatch, driver)
    trouble = why_no_cuda(survey_gpus(), torch, environment)
    assert words in trouble.text and trouble.hint


def test_matching_versions_are_no_trouble(monkeypatch):
    fake_nvml.install(monkeypatch, Driver([Card()], cuda=13010))
    assert why_no_cuda(survey_gpus(), CUDA_TORCH, {"CUDA_VISIBLE_DEVICES": "0"}) is None
    # within one major version of CUDA, an older driver serves
    assert why_no_cuda(survey_gpus(), TorchBuild("2.11", (13, 2)), {}) is None


def test_a_card_that_fails_during_measurement_is_an_error(monkeypatch):
    broken = replace(
        MEASURED, gpu_trouble="CUDA error: out of memory", matmul=(), links=Links(None, None, None, 1e10, 1e9)
    )
    verdict = only(verdicts(monkeypatch, Driver([Card()]), broken), "CUDA")
    assert verdict.level == "error" and "out of memory" in verdict.text


def test_memory_that_cannot_be_pinned_is_a_warning(monkeypatch):
    verdict = only(verdicts(monkeypatch, Driver([Card()]), replace(MEASURED, pinning_works=False)), "pinning")
    assert verdict.level == "warn" and "ulimit" in verdict.hint


def test_a_missing_compiler_is_named_where_a_gpu_computes():
    machine = hardware(GpuSurvey())
    (verdict,) = [each for each in judge(machine, MEASURED, {}, has_compiler=False) if each.topic == "Triton"]
    assert verdict.level == "warn" and "gcc" in str(verdict.hint)
    on_cpu = replace(MEASURED, device="cpu")
    for measured, has_compiler in ((MEASURED, True), (on_cpu, False)):
        found = judge(machine, measured, {}, has_compiler=has_compiler)
        assert all(each.topic != "Triton" for each in found)


def test_modules_can_be_built_with_a_compiler_and_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    (tmp_path / "gcc").touch(mode=0o755)
    for headers, path, expected in (
        (False, tmp_path, False),
        (True, tmp_path / "empty", False),
        (True, tmp_path, True),
    ):
        monkeypatch.setenv("PATH", str(path))
        if headers:
            (tmp_path / "Python.h").touch()
        can_build_modules.cache_clear()
        assert can_build_modules() == expected
    can_build_modules.cache_clear()
