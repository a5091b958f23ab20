"""What specchat is measured against: transformers' own `generate` over accelerate's offloading, nothing of ours in it.

Beside `models.hf` the only module that imports transformers. It is kept apart because it uses transformers as anyone
would, through its public functions, while everything there bends it to the engine's needs.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf

from specchat.closing import Closeable
from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE, open_checkpoint
from specchat.models.hf.config import load_config
from specchat.models.hf.skeleton import build_skeleton
from specchat.models.packs.file_format import PAD_PREFIX
from specchat.records.generation import Sampling
from specchat.records.model import Dtype, ModelSource


@dataclass(frozen=True)
class OffloadedAnswer:
    """What `generate` wrote, and when.

    Attributes:
        token_ids: without the prompt.
        pass_tokens: tokens that each pass of the target brought.
        pass_ends_s: when they came, seconds since the call, pauses between passes left out.
    """

    token_ids: tuple[int, ...]
    pass_tokens: tuple[int, ...]
    pass_ends_s: tuple[float, ...]


@dataclass
class _Watch:
    """Follows one call of `generate`: tokens as they come, and a pause before each pass that is not its time.

    It is `generate`'s streamer and, by `should_stop`, one of its stopping criteria.
    """

    before_pass: Callable[[], None] | None
    should_stop: Callable[[], bool]
    begin: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0
    saw_prompt: bool = False
    pass_tokens: list[int] = field(default_factory=list)
    pass_ends_s: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        """New tokens; the prompt comes first."""
        if self.saw_prompt:
            self.pass_tokens.append(value.numel())
            self.pass_ends_s.append(time.perf_counter() - self.begin - self.paused_s)
        self.saw_prompt = True

    def end(self) -> None:
        """The answer is over."""

    def pause(self, *_: Any) -> None:
        """Runs before every pass of the target."""
        if self.before_pass is not None:
            begin = time.perf_counter()
            self.before_pass()
            self.paused_s += time.perf_counter() - begin

    def stops(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Whether to stop after this pass: bool [B]."""
        return torch.full((input_ids.shape[0],), self.should_stop(), device=input_ids.device)


class OffloadedModel(Closeable):
    """A model whose layers accelerate fetches for every pass: from disk when it computes on the CPU, else from RAM.

    Args:
        source: local files.
        dtype: of weights and activations.
        device: where passes run.
        resident: indices of layers that stay there; the others are fetched.
        draft: drafts for `generate` (assisted generation), or None.
    """

    def __init__(
        self, source: ModelSource, *, dtype: Dtype, device: str, resident: Sequence[int], draft: ModelSource | None
    ) -> None:
        self._folders = ExitStack()
        with _silence():
            folder = self._folders.enter_context(_with_index(source.path))
            self._model = _load_offloaded(folder, torch_dtype(dtype), device, set(resident))
            self._draft = None if draft is None else _load_whole(draft, torch_dtype(dtype), device)
        self._device = torch.device(device)
        self._vocab_size: int = self._model.config.vocab_size

    def close(self) -> None:
        """Lets go of the weights."""
        self._model = self._draft = None
        self._folders.close()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        max_tokens: int,
        before_pass: Callable[[], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> OffloadedAnswer:
        """transformers' answer to a prompt; sampled with its own random numbers, so only greedy text can be compared.

        Args:
            prompt_ids: all tokens so far; every call computes all of them.
            sampling: how tokens are drawn.
            stop_ids: tokens that end the answer and are its last.
            max_tokens: longest answer.
            before_pass: called before each pass of the target; its time is not counted.
            should_stop: asked after each pass.
        """
        torch.manual_seed(sampling.seed)
        ids = torch.tensor([list(prompt_ids)], device=self._device)
        watch = _Watch(before_pass, should_stop)
        hook = self._model.register_forward_pre_hook(watch.pause)
        try:
            with _silence(), torch.inference_mode():
                out = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=_generation_config(sampling, stop_ids, max_tokens),
                    streamer=watch,
                    stopping_criteria=hf.StoppingCriteriaList([watch.stops]),
                    **({} if self._draft is None else {"assistant_model": self._draft}),
                )
        finally:
            hook.remove()
        return OffloadedAnswer(
            tuple(out[0, len(prompt_ids) :].tolist()), tuple(watch.pass_tokens), tuple(watch.pass_ends_s)
        )

    @torch.inference_mode()
    def measure_pass(self, num_rows: int, seed: int = 0) -> float:
        """Seconds that one pass over random tokens takes, from an empty cache and without the head."""
        tokens = torch.randint(0, self._vocab_size, (1, num_rows), generator=torch.Generator().manual_seed(seed))
        ids = tokens.to(self._device)
        begin = time.perf_counter()
        self._model.get_decoder()(input_ids=ids, use_cache=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin


@contextmanager
def _with_index(folder: Path) -> Iterator[Path]:
    """`folder`, or links to its files beside an index where it has none: packs do without, `from_pretrained` cannot."""
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        yield folder
        return
    tensors = open_checkpoint(folder).tensors
    files = {key: info.file.name for key, info in tensors.items() if not key.startswith(PAD_PREFIX)}
    with TemporaryDirectory(prefix="specchat-") as name:
        linked = Path(name)
        for file in folder.iterdir():
            (linked / file.name).symlink_to(file.resolve())
        total_size = sum(info.nbytes for info in tensors.values())
        (linked / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": files}))
        yield linked


def _load_offloaded(folder: Path, dtype: torch.dtype, device: str, resident: set[int]) -> Any:
    """`from_pretrained` with a device map that keeps the same layers on the device as our own plan does."""
    skeleton = build_skeleton(load_config(folder), dtype)
    num_layers = len(skeleton.layers)
    away = "disk" if device == "cpu" else "cpu"
    device_map = dict(_device_map(skeleton.model, skeleton.layers_name, "", device))
    for index in range(num_layers):
        device_map[f"{skeleton.layers_name}.{index}"] = device if index in resident else away
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map=device_map,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    _own_memory(model)
    model.generation_config = hf.GenerationConfig()  # what the model's makers recommend is not what is measured
    return model


def _load_whole(source: ModelSource, dtype: torch.dtype, device: str) -> Any:
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
    )
    model = model.to(device).eval()
    _own_memory(model)
    model.generation_config = hf.GenerationConfig(is_assistant=True)
    return model


@torch.no_grad()
def _own_memory(model: Any) -> None:
    """Makes CPU weights private memory, like ours, where they are pages of the checkpoint that are mapped.

    Writing to a private mapping copies the page. The addresses stay, by which accelerate knows tied weights.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.mul_(1)


def _device_map(module: Any, layers_name: str, prefix: str, device: str) -> list[tuple[str, str]]:
    """Everything but the layers stays: (module path, device), as few of them as possible."""
    entries = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if layers_name.startswith(f"{path}."):
            entries += _device_map(child, layers_name, f"{path}.", device)
        elif path != layers_name:
            entries.append((path, device))
    return entries


def _generation_config(sampling: Sampling, stop_ids: frozenset[int], max_tokens: int) -> Any:
    drawing: dict[str, Any] = {}
    if not sampling.greedy:
        drawing = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    stops = sorted(stop_ids)
    return hf.GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=not sampling.greedy,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=stops or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=True,
        **drawing,
    )


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps notices and bars of transformers and accelerate off stderr; they are addressed to their own users."""
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    offloading = logging.getLogger("accelerate.big_modeling")
    level = offloading.level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    offloading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        offloading.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
