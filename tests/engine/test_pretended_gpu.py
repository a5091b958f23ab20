"""The engine's CUDA paths on a pretended GPU: the text of the CPU, and nothing that a GPU refuses.

The text must be equal over tiers, quantizations, processors and kinds of layers. The default run takes a small share of
the cross; `-m slow` takes all of it. test_gpu_budgets.py holds what a step may ask of a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.engines import NOTHING, make_plan, random_prompt, write
from support.fp4 import modelopt, mxfp4, nvfp4
from support.gguf_files import save_gguf
from support.heads import LAYOUTS, head_of, random_target, save_with_mtp
from support.hybrids import HYBRIDS, random_hybrid
from support.loading import load_engine
from support.plans import changed
from support.pretended_gpu import PretendedGpu, WrongDeviceError
from support.quantized import Kind, awq, block_fp8, bnb4, bnb8, compressed, gptq, save_quantized
from support.tiny_models import ARCHITECTURES, BASE, SPECIAL, VOCAB, make_config, perturbed, random_model, save

from specchat.engine.device import release_memory
from specchat.engine.drafting.policy import FixedPolicy
from specchat.engine.engine import Engine
from specchat.models.quant.autotune import autotuner
from specchat.records.generation import Request, Sampling
from specchat.records.model import ModelSource

NUM_TOKENS = 8
GREEDY = Sampling()
SAMPLED = Sampling(temperature=0.8, seed=5)
PROCESSED = Sampling(temperature=0.9, seed=6, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
SAMPLINGS = (SAMPLED, PROCESSED, GREEDY)
# Tiers and chunks: everything from RAM, some layers resident, some or all from disk, embeddings on the host, chunks.
PLACES: tuple[dict[str, Any], ...] = (
    {},
    {"resident": (0, 2)},
    {"in_ram": (1,), "chunk_rows": 8},
    {"in_ram": (), "slots": 1},
    {"host_embeddings": True, "resident": (1,)},
)


@dataclass(frozen=True)
class Case:
    """One pair of models, and how it is loaded.

    Attributes:
        name: name of the test.
        make: function from a folder to target, draft, and the number of the target's layers.
        sampling: parameters of the draws.
        place: where layers lie on the GPU.
        options: values of the plan on both devices.
    """

    name: str
    make: Callable[[Path], tuple[ModelSource, ModelSource | None, int]] = field(repr=False)
    sampling: Sampling = SAMPLED
    place: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def pair_of(model: Any, folder: Path) -> tuple[ModelSource, ModelSource, int]:
    draft = save(perturbed(model, 0.03), folder / "draft")
    return save(model, folder / "target"), draft, model.config.num_hidden_layers


def model_of(architecture: str) -> Any:
    return random_hybrid(architecture) if architecture in HYBRIDS else random_model(make_config(architecture))


def plain(architecture: str) -> Callable[[Path], Any]:
    return lambda folder: pair_of(model_of(architecture), folder)


def quantized(architecture: str, kind: Kind) -> Callable[[Path], Any]:
    def make(folder: Path) -> tuple[ModelSource, ModelSource, int]:
        model = model_of(architecture)
        pair = save_quantized(model, folder, kind)
        return pair.quantized, save(perturbed(model, 0.02), folder / "draft"), model.config.num_hidden_layers

    return make


def in_gguf(config: str, kind: str) -> Callable[[Path], Any]:
    values = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "moe_intermediate_size": 64}

    def make(folder: Path) -> tuple[ModelSource, ModelSource, int]:
        model = random_model(getattr(hf, config)(**{**BASE, **values, "norm_topk_prob": True}))
        draft = save_gguf(perturbed(model, 0.02), folder / "draft.gguf", "F16")
        return save_gguf(model, folder / "x.gguf", kind), draft, model.config.num_hidden_layers

    return make


def with_head(architecture: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> tuple[ModelSource, ModelSource, int]:
        model = random_target(architecture)
        target = save_with_mtp(model, folder / "target", LAYOUTS[architecture])
        return target, head_of(target), model.config.num_hidden_layers

    return make


def without_draft(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def make_target(folder: Path) -> tuple[ModelSource, None, int]:
        target, _, num_layers = make(folder)
        return target, None, num_layers

    return make_target


KINDS = {
    "gptq": gptq(act_order=True),
    "gptq8": gptq(8, sym=True, version=2),
    "awq": awq(16),
    "bnb4": bnb4(dtype=torch.float32),
    "bnb4-fp4": bnb4("fp4", nested=False, dtype=torch.float32),
    "bnb8": bnb8(),
    "fp8-blocks": block_fp8((32, 32)),
    "compressed4": compressed("pack-quantized", group=32, sym=False),
    "compressed8": compressed("int-quantized", bits=8, strategy="channel"),
    "compressed-fp8": compressed("float-quantized", bits=8, strategy="channel"),
    "mxfp4": mxfp4(),
    "nvfp4": nvfp4(),
    "modelopt": modelopt(),
}
# Architectures whose input embeddings cannot stay on the host, because the head shares them.
TIED = {
    "llama_tied",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_shared",
    "gemma4_moe",
    "gemma4_k_eq_v",
    "cohere2",
}
TIED |= {"gpt2", "zamba2", "bamba", "falcon_h1"}
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "BF16", "F16")


def cross() -> Iterator[Case]:
    """Every kind of model by every quantization; samplings and places take turns."""
    made: list[tuple[str, Callable[[Path], Any], dict[str, Any]]] = []
    for architecture in (*ARCHITECTURES, *SPECIAL, *HYBRIDS):
        quants = ("none", "int8", "int4") if architecture in ARCHITECTURES else ("none", "int4")
        made += [(f"{architecture}-{quant}", plain(architecture), {"quant": quant}) for quant in quants]
    for architecture in ("llama", "qwen3_moe"):
        made += [(f"{architecture}-{name}", quantized(architecture, kind), {}) for name, kind in KINDS.items()]
    for config in ("LlamaConfig", "Qwen3MoeConfig"):
        made += [(f"{config}-{kind}", in_gguf(config, kind), {}) for kind in BLOCKS]
    for architecture in LAYOUTS:
        made.append((f"{architecture}-mtp", with_head(architecture), {}))
        made.append((f"{architecture}-mtp-retrieval", with_head(architecture), {"retrieval": True}))
    made.append(("llama-retrieval", without_draft(plain("llama")), {"retrieval": True}))
    made.append(("llama-plain", without_draft(plain("llama")), {}))
    made.append(("llama-int4-int8", plain("llama"), {"quant": "int4", "draft_quant": "int8"}))
    for i, (name, make, options) in enumerate(made):
        places = PLACES[:-1] if name.partition("-")[0] in TIED else PLACES
        yield Case(name, make, SAMPLINGS[i % len(SAMPLINGS)], places[i % len(places)], options)


# Experts, a recurrent layer, a quantization, processors, and all three tiers.
BRIEF = (
    Case("qwen3_moe-int4", plain("qwen3_moe"), PROCESSED, PLACES[2], {"quant": "int4"}),
    Case("lfm2-none", plain("lfm2"), SAMPLED, PLACES[1]),
)


def loaded(case: Case, models: Any, device: str) -> Engine:
    target, draft, num_layers = models
    place = dict(case.place) if device != "cpu" else {}
    resident = place.pop("resident", ()) if device != "cpu" else range(num_layers)
    plan = make_plan(target, draft, num_layers=num_layers, resident=resident, retrieval=case.options.get("retrieval"))
    in_ram = [index for index in place.pop("in_ram", range(num_layers)) if index in plan.placement.streamed]
    plan = changed(plan, device=device, **{"in_ram": tuple(in_ram), **place, **case.options})
    return load_engine(plan, target, draft)


def check(case: Case, folder: Path) -> None:
    models, prompt = case.make(folder), random_prompt(20, VOCAB)
    with loaded(case, models, "cpu") as engine:
        expected, _ = write(engine, prompt, case.sampling, NUM_TOKENS)
    with PretendedGpu() as gpu, loaded(case, models, "cuda:0") as engine:
        assert {parameter.device.type for parameter in engine.target.skeleton.layers.parameters()} == {"cuda"}
        text, steps = write(engine, prompt, case.sampling, NUM_TOKENS)
        assert gpu.counts("verifying")["kernel"] > 0
    assert text == expected
    assert steps[0].streamed_bytes > 0


@pytest.mark.parametrize("case", BRIEF, ids=str)
def test_the_text_is_that_of_the_cpu(case: Case, tmp_path: Path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cross()), ids=str)
def test_the_text_is_that_of_the_cpu_full_cross(case: Case, tmp_path: Path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES[:-1], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma4_shared", "lfm2"])
def test_answers_that_share_passes_are_those_of_the_cpu(architecture: str, place: dict[str, Any], tmp_path: Path):
    case = Case("seats", plain(architecture), place=place, options={"seats": 3, "retrieval": True})
    models, texts = case.make(tmp_path), list[dict[int, list[int]]]()
    prompts = [tuple(random_prompt(length, VOCAB, seed=length)) for length in (5, 33, 17, 9)]
    requests = [Request(prompt, SAMPLINGS[i % 3], max_tokens=12) for i, prompt in enumerate(prompts)]
    for device in ("cpu", "cuda:0"):
        with PretendedGpu() if device != "cpu" else nullcontext(), loaded(case, models, device) as engine:
            texts.append({index: [] for index in range(len(requests))})
            for index, step in engine.generate_many(requests):
                texts[-1][index] += step.token_ids
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_interrupted_answer_goes_on_as_on_the_cpu(place: dict[str, Any], tmp_path: Path):
    case, prompt = Case("interrupt", plain("llama"), place=place), random_prompt(20, VOCAB)
    models = case.make(tmp_path)
    with loaded(case, models, "cpu") as engine:
        expected, _ = write(engine, prompt, SAMPLED, NUM_TOKENS)
    with PretendedGpu(), loaded(case, models, "cuda:0") as engine:
        cancel = threading.Event()
        steps = engine.generate(prompt, SAMPLED, stop_ids=NOTHING, max_tokens=NUM_TOKENS, cancel=cancel)
        begin = list(next(steps).token_ids)
        cancel.set()
        assert next(steps).finish_reason == "interrupt"
        rest, _ = write(engine, [*prompt, *begin], SAMPLED, NUM_TOKENS - len(begin))
    assert [*begin, *rest] == expected


# --- the pretended GPU itself ----------------------------------------------------------------------------------------


def test_what_a_gpu_refuses_is_refused():
    with PretendedGpu(num_devices=2) as gpu:
        there, here, other = torch.ones(3, device="cuda:0"), torch.ones(3), torch.ones(3, device="cuda:1")
        for strange in (here, other):
            with pytest.raises(WrongDeviceError):
                _ = there + strange
            with pytest.raises(WrongDeviceError):
                torch.nn.functional.linear(there, strange)
            with pytest.raises(WrongDeviceError):
                torch.cat([there, strange])
        with pytest.raises(WrongDeviceError):
            there.index_select(0, torch.tensor([1]))
        with pytest.raises(TypeError):
            there.numpy()
        with pytest.raises(RuntimeError, match="ordinal"):
            torch.ones(3, device="cuda:2")
        gpu.events.clear()
        assert (there + torch.tensor(2.0)).sum().item() == 9  # a number may be anywhere
        assert there[torch.tensor([0, 2])].device == torch.device("cuda:0")  # so may an index
        with torch.inference_mode():
            assert there.sum().item() == 3
        assert gpu.counts() == {"kernel": 4, "h2d": 1, "wait": 2}
        assert there.to("cpu").is_cpu and here.to("cuda:1").device == other.device
        assert gpu.counts()["d2h"] == 1 and gpu.counts()["h2d"] == 2
    assert not hasattr(there.cpu(), "pretended") and torch.ones(2).device.type == "cpu"


# --- what loading sets and leaves ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSource, ModelSource, int]:
    return pair_of(model_of("llama"), tmp_path_factory.mktemp("llama"))


def test_the_second_gpu_leaves_the_first_alone(llama: Any, monkeypatch: pytest.MonkeyPatch):
    """Nor does torch try cuDNN's attention, which plans anew for every number of keys, nor does a waiting host spin."""
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    case, prompt = Case("second", plain("llama"), place=PLACES[2]), random_prompt(20, VOCAB)
    try:
        with PretendedGpu(num_devices=2) as gpu:
            with loaded(case, llama, "cuda:1") as engine:
                write(engine, prompt, GREEDY, 4)
                assert engine.target.streamer._host._lent is None  # the disk reads on while the draft runs
            assert gpu.runtime.implied == {1} and set(gpu.runtime.timed) == {torch.device("cuda:1")}
            assert not gpu.runtime.pinned
            waits = {event.name for event in gpu.events if event.kind == "wait" and event.phase == "verifying"}
            assert waits == {"event.synchronize", "stream.synchronize"}
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def test_closed_engines_give_their_memory_back(llama: Any):
    case = Case("closed", plain("llama"))
    with PretendedGpu() as gpu:
        with loaded(case, llama, "cuda:0") as engine:
            layers = weakref.ref(engine.target.skeleton.layers)
        del engine
        release_memory()
        assert layers() is None
        assert any(event.name == "empty_cache" for event in gpu.events)


def test_passes_that_measure_kernels_are_not_learned_from(llama: Any, monkeypatch: pytest.MonkeyPatch):
    case, recorded = Case("measured", plain("llama"), options={"quant": "int4", "dtype": "bf16"}), list[int]()
    with PretendedGpu() as gpu, loaded(case, llama, "cuda:0") as engine:
        assert gpu.counts()["kernel"] > 0
        monkeypatch.setattr(autotuner(), "_known", {})
        monkeypatch.setattr(FixedPolicy, "record_pass", lambda _, steps, *__: recorded.append(len(steps)))
        _, steps = write(engine, random_prompt(20, VOCAB), GREEDY, 12)
    assert 0 < len(recorded) < len(steps)  # the prompt has more rows than a tree, and both were new


def test_kernels_are_chosen_before_the_first_answer(llama: Any):
    case = Case("warm", plain("llama"), options={"quant": "int4", "dtype": "bf16", "tree_budget": 16})
    with PretendedGpu(kernels=("fused", "triton")), loaded(case, llama, "cuda:0"):
        chosen = [product.rsplit(" bfloat16 ")[-1] for known in autotuner()._known.values() for product in known]
    rows = {product.split()[-2] for product in chosen}
    assert rows == {"1", "32"} | {"8"}  # of plain decoding, of the tree, and of the draft or of the head's blocks
