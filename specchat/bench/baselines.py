"""The offloading baseline: transformers' own `generate` with accelerate's offloading, without code of the engine.

Apart from `models.hf`, this is the only module that imports transformers. It uses only public functions, as any user
would, while `models.hf` adapts transformers to the engine.
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
    """Tokens that `generate` wrote, with the times of its passes.

    Attributes:
        token_ids: tokens of the answer, without the prompt.
        pass_tokens: number of tokens that each pass of the target emitted.
        pass_ends_s: end of each pass in seconds since the call, without the pauses between passes.
    """

    token_ids: tuple[int, ...]
    pass_tokens: tuple[int, ...]
    pass_ends_s: tuple[float, ...]


@dataclass
class _Watch:
    """An observer of one call of `generate`: counts tokens and excludes the pauses before passes from their time.

    Serves as `generate`'s streamer and, through `stops`, as one of its stopping criteria.
    """

    before_pass: Callable[[], None] | None
    should_stop: Callable[[], bool]
    begin: float = field(default_factory=time.perf_counter)
    paused_s: float = 0.0
    saw_prompt: bool = False
    pass_tokens: list[int] = field(default_factory=list)
    pass_ends_s: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        """Record new tokens; skip the first call, which passes the prompt."""
        if self.saw_prompt:
            self.pass_tokens.append(value.numel())
            self.pass_ends_s.append(time.perf_counter() - self.begin - self.paused_s)
        self.saw_prompt = True

    def end(self) -> None:
        """Ignore the end of the answer."""

    def pause(self, *_: Any) -> None:
        """Call `before_pass` and count its time as a pause."""
        if self.before_pass is not None:
            begin = time.perf_counter()
            self.before_pass()
            self.paused_s += time.perf_counter() - begin

    def stops(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Return whether to stop after this pass, bool [B]."""
        return torch.full((input_ids.shape[0],), self.should_stop(), device=input_ids.device)


class OffloadedModel(Closeable):
    """A model offloaded by accelerate: for every pass, layers come from disk if the device is the CPU, else from RAM.

    Args:
        source: model with local files.
        dtype: dtype of weights and activations.
        device: device that computes passes.
        resident: indices of the layers that stay on the device; the others are offloaded.
        draft: draft model for assisted generation, or None.
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
        """Release the weights."""
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
        """Answer a prompt with transformers' `generate`.

        Only greedy text can be compared with specchat's, because transformers samples with its own random numbers.

        Args:
            prompt_ids: all tokens of the conversation; every call computes all of them.
            sampling: sampling of the answer.
            stop_ids: tokens that end the answer, of which they are the last.
            max_tokens: longest answer in tokens.
            before_pass: function called before each pass of the target; its time is not counted.
            should_stop: function called after each pass; True ends the answer.
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
        """Return the seconds that one pass over random tokens takes, with an empty KV cache and without the head."""
        tokens = torch.randint(0, self._vocab_size, (1, num_rows), generator=torch.Generator().manual_seed(seed))
        ids = tokens.to(self._device)
        begin = time.perf_counter()
        self._model.get_decoder()(input_ids=ids, use_cache=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - begin


@contextmanager
def _with_index(folder: Path) -> Iterator[Path]:
    """Yield a folder with an index: `folder` itself, or for a pack, which has none, links to its files and an index."""
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
    """Load a model with a device map that keeps the same layers on the device as the engine's plan."""
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
        local_files_only=True,
        trust_remote_code=False,
    ).eval()
    _own_memory(model)
    model.generation_config = hf.GenerationConfig()  # the settings that the model recommends are not measured
    return model


def _load_whole(source: ModelSource, dtype: torch.dtype, device: str) -> Any:
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        source.path, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    model = model.to(device).eval()
    _own_memory(model)
    model.generation_config = hf.GenerationConfig(is_assistant=True)
    return model


@torch.no_grad()
def _own_memory(model: Any) -> None:
    """Copy mapped checkpoint pages of CPU weights into private memory, where the engine's weights are too.

    Writing to a private mapping copies the page. Addresses stay, and accelerate recognizes tied weights by them.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.mul_(1)


def _device_map(module: Any, layers_name: str, prefix: str, device: str) -> list[tuple[str, str]]:
    """Return a device map that keeps all modules but the layers on the device, with as few entries as possible."""
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
    """Silence the notices and progress bars of transformers and accelerate, which are meant for their own users."""
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
