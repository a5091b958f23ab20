"""What `specchat bench` plans on a GPU, where the baselines need memory beside the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.loading import Quiet, model_request
from support.pretended_gpu import PretendedGpu
from support.tiny_models import make_config, random_model, save

from specchat.cli.bench import _shared
from specchat.loading import planning
from specchat.loading.models import Models
from specchat.loading.request import ModelRequest
from specchat.records.plan import Plan


@pytest.mark.slow
def test_systems_share_the_memory_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    warnings = list[str]()
    monkeypatch.setattr(Quiet, "warn", lambda _, text: warnings.append(text))
    models = Models(save(random_model(make_config("llama")), tmp_path / "m"), None, "none")
    request = model_request("m", draft="none", device="cuda:0")

    def plan_of(request: ModelRequest, baselines: tuple[str, ...]) -> Plan:
        planned = planning.make_plan(request, models, Quiet(), as_given=True)
        return _shared(planned, request, baselines, Quiet()).plan

    with PretendedGpu():
        whole = plan_of(request, ("plain",))
        assert not warnings
        shared = [plan_of(request, names) for names in (("accelerate",), ("accelerate", "assisted"))]
        asked = plan_of(model_request("m", draft="none", device="cuda:0", vram_bytes=1 << 30), ("accelerate",))
    assert [plan.vram_bytes for plan in shared] == [whole.vram_bytes // 2, whole.vram_bytes // 3]
    assert len(warnings) == 2 and asked.vram_bytes == 1 << 30
    assert {plan.work.head_rows for plan in (whole, *shared)} == {32}
