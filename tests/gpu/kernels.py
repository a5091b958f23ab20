"""Facts about quantized kernels and draft passes on a GPU: milliseconds, and GB/s of the stored bytes."""

from __future__ import annotations

import traceback
from functools import partial

import torch
from gpu.timing import DEVICE, Fact, Scale, device_ms, host_us

from specchat.engine.attention import tree_attention
from specchat.engine.drafting.pass_graphs import PassGraphs
from specchat.engine.kv_cache import TreeCache
from specchat.engine.layout import PassLayout, RowLayout
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Noise
from specchat.engine.streaming.base import NoStreamer
from specchat.models.hf.skeleton import build_random
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.ggml import Blocks
from specchat.models.quant.formats.int3 import Int3
from specchat.models.quant.formats.int8 import Int8
from specchat.models.quant.formats.nf4 import Bnb4
from specchat.models.quant.formats.plain import Plain
from specchat.models.quant.kernels.chunked import scratch_bytes
from specchat.models.quant.kernels.grouped import Grouping, has_grouped, multiply_grouped
from specchat.models.quant.kernels.refusals import take_refusals
from specchat.records.model import KvShape

# Rows and columns of the matrices of a draft of 1.2 billion weights and of a 70B model's head.
_DRAFT_SHAPES = ((512, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048), (128256, 8192))
_LAYER_SHAPE = (28672, 8192)
_PREFIX = 500  # rows of the draft's cache


def formats(scale: Scale) -> Fact:
    """A matrix of a 70B model's layer in our own formats, and as it is."""
    kinds = {"bf16": Plain(torch.bfloat16), "nf4": Bnb4(), "int8": Int8(), "int3": Int3()}
    kinds |= {"affine 4": Affine(4, 128, torch.float16, zeros=True)}
    return _timed(kinds, (scale.of(_LAYER_SHAPE[0]), scale.of(_LAYER_SHAPE[1])), (1, 16, 64, 256), 5)


def gguf(scale: Scale) -> Fact:
    """The same matrix in block types of GGUF files."""
    kinds = {kind: Blocks(kind) for kind in ("Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4")}
    return _timed(kinds, (scale.of(_LAYER_SHAPE[0]), max(scale.of(_LAYER_SHAPE[1]), 256)), (1, 16, 64), 5)


def few_rows(scale: Scale) -> Fact:
    """Matrices of a draft and of heads with the rows of draft passes: as they are, in int8 and in 4 bits."""
    kinds, found = {"bf16": Plain(torch.bfloat16), "int8": Int8(), "nf4": Bnb4()}, Fact()
    for rows, cols in _DRAFT_SHAPES:
        timed = _timed(kinds, (scale.of(rows), scale.of(cols)), (8, 32), scale.calls)
        found |= {f"{rows}x{cols} {name}": value for name, value in timed.items()}
    return found


def experts(scale: Scale) -> Fact:
    """128 experts of 1536 x 2048 in one kernel, eight for each row."""
    if not has_grouped(DEVICE):
        return {"grouped": "no kernel"}
    shape, num_experts, found = (scale.of(1536), max(scale.of(2048), 256)), max(128 // scale.divisor, 8), Fact()
    for name, form in {"nf4": Bnb4(), "int8": Int8(), "Q4_K": Blocks("Q4_K"), "MXFP4": Blocks("MXFP4")}.items():
        tile, matrices = form.tile_form(shape), [_segments(form, shape) for _ in range(num_experts)]
        assert tile is not None
        addresses = torch.tensor([[each[key].data_ptr() for each in matrices] for key in matrices[0]]).to(DEVICE)
        for rows in (1, 65):
            chosen = torch.stack([torch.randperm(num_experts)[:8] for _ in range(rows)]).reshape(-1)
            grouping = Grouping.of(chosen.to(DEVICE), num_experts)
            x = torch.randn(rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
            out = torch.empty(len(chosen), shape[0], device=DEVICE, dtype=torch.bfloat16)
            call = partial(multiply_grouped, x, grouping, addresses, tile, shape, out, first=0, per_row=8)
            read = sum(each.nbytes for each in matrices[0].values()) * len(chosen.unique())
            found[f"{name}, {rows} rows"] = _rate(read, device_ms(call, scale.calls))
    return found | _refused()


def draft(scale: Scale) -> Fact:
    """A draft of 1.2 billion weights: milliseconds of a pass, eager and as a graph, and of weighing its scores."""
    model, found = _draft_model(scale), Fact()
    model.append([5] * _PREFIX)
    graphs = PassGraphs(model)
    for rows in (1, 8, 32):
        layout = RowLayout(_PREFIX, 0, torch.eye(rows, dtype=torch.bool), torch.full((rows,), _PREFIX + 1))
        there = RowLayout(_PREFIX, 0, layout.ancestors.to(DEVICE), layout.positions.to(DEVICE))
        tokens = torch.full((rows,), 7, device=DEVICE)

        def run(rows: int = rows, layout: RowLayout = layout) -> None:
            model.cache.truncate(0, _PREFIX)
            model.logits(model.forward([7] * rows, PassLayout.single(layout)))

        def replay(tokens: torch.Tensor = tokens, there: RowLayout = there) -> None:
            model.cache.truncate(0, _PREFIX)
            graphs.compute(0, tokens, there)

        for name, call in (("eager", run), ("graph", replay)):
            for _ in range(2):  # the first pass is computed, the second is recorded
                call()
            found[f"{name} host ms, {rows} rows"] = round(host_us(call, scale.calls) / 1e3, 3)
            found[f"{name} device ms, {rows} rows"] = device_ms(call, scale.calls)
        scores = torch.randn(rows, model.vocab_size, device=DEVICE)
        found[f"weighing ms, {rows} rows"] = device_ms(lambda s=scores: torch.log_softmax(s, -1).topk(16), scale.calls)
    noise, positions = Noise(1, model.vocab_size, DEVICE), iter(range(10**9))
    found["noise row ms"] = device_ms(lambda: noise.row(next(positions)), scale.calls)
    return found | {"recorded passes": graphs.num_recorded, "news": "; ".join(model.take_news())}


def _draft_model(scale: Scale) -> TreeModel:
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=scale.of(128256),
        hidden_size=scale.of(2048),
        intermediate_size=scale.of(8192),
        num_hidden_layers=max(16 // scale.divisor, 2),
        num_attention_heads=max(32 // scale.divisor, 2),
        num_key_value_heads=max(8 // scale.divisor, 1),
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )
    skeleton, _ = build_random(config, torch.Generator(), tree_attention)
    skeleton.model.to(DEVICE, torch.bfloat16)
    size = config.hidden_size // config.num_attention_heads
    shapes = (KvShape(config.num_key_value_heads, size, size),) * config.num_hidden_layers
    return TreeModel(skeleton, TreeCache(shapes, 1024, torch.bfloat16, DEVICE), NoStreamer(), (), 512, DEVICE)


def _timed(forms: dict[str, WeightFormat], shape: tuple[int, int], all_rows: tuple[int, ...], calls: int) -> Fact:
    """Rates by format, kernel and rows of x; a kernel that fails is named, and the others go on."""
    found: Fact = {}
    for name, form in forms.items():
        segments = _segments(form, shape)
        nbytes = sum(each.nbytes for each in segments.values())
        scratch = torch.empty(scratch_bytes(shape, torch.bfloat16, DEVICE), dtype=torch.uint8, device=DEVICE)
        for rows in all_rows:
            x = torch.randn(1, rows, shape[1], device=DEVICE, dtype=torch.bfloat16)
            for kind, kernel in form.kernels(shape, rows, x.dtype, x.device).items():
                try:
                    ms = device_ms(partial(kernel, x, segments, shape, scratch, None), calls)
                except Exception as error:  # noqa: BLE001  the other kernels are worth having
                    traceback.print_exc(limit=-2)
                    found[f"{name} {kind}, {rows} rows"] = f"failed: {str(error).strip()[:120]}"
                else:
                    found[f"{name} {kind}, {rows} rows"] = _rate(nbytes, ms)
    return found | _refused()


def _segments(form: WeightFormat, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    return {each.name: torch.ones(each.shape, device=DEVICE, dtype=each.dtype) for each in form.segments(*shape)}


def _rate(nbytes: int, ms: float) -> str:
    return f"{ms:.4f} ms, {nbytes / max(ms, 1e-6) / 1e6:.0f} GB/s"


def _refused() -> Fact:
    return {"refused": refusals} if (refusals := "; ".join(take_refusals())) else {}
