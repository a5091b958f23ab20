"""A trial of one model type: does specchat open it, and does it write what transformers writes?"""

from __future__ import annotations

import builtins
import copy
import inspect
import re
import shutil
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from specchat.errors import SpecchatError, UnsupportedModelError
from specchat.loading.checking import check_model
from specchat.loading.engine import load_planned
from specchat.models.sizes.inspect import inspect_model
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource
from support import reference
from support.engines import make_plan, random_prompt, write
from support.loading import Quiet
from support.sweep.configs import default_config, model_class, tiny_config, with_tie
from support.tiny_models import perturbed, randomize, save

NUM_TOKENS = 24
_PROMPT_ROWS = 40
_PROMPT_VOCAB = 200  # ids above may be those of images
_CHUNK_ROWS = 24
_FEWEST_WORDS = 8  # a text of fewer different tokens compares little
# Embeddings and penalties, tried in turn: some architectures repeat one token with the first ones.
_ATTEMPTS = ((None, 1.3), (0.1, 1.3), (0.02, 1.3), (None, 3.0))
_EXCEPTIONS = {name for home in (builtins, torch) for name in dir(home) if name.endswith("Error")} | {"StopIteration"}
_LONGEST_REASON = 200

Result = Literal["exact", "refused", "broken"]


@dataclass(frozen=True)
class Outcome:
    """What became of a type.

    Attributes:
        kind: model type.
        result: exact, refused or broken.
        detail: the reason of a refusal; what is broken; what was compared.
    """

    kind: str
    result: Result
    detail: str


class _Text(NamedTuple):
    """What transformers writes, and with which sampling."""

    sampling: Sampling
    expected: reference.Reference


class _RefusedError(Exception):
    """specchat refuses a type and says why."""


class _BrokenError(Exception):
    """specchat fails on a type, and it is known how."""


def try_type(kind: str, folder: Path) -> Outcome:
    """Check the whole-size and a tiny configuration, and compare texts of tiny models with tied and untied heads."""
    _without_timm()
    trial = _Trial(kind, folder)
    try:
        return Outcome(kind, "exact", trial.run())
    except _RefusedError as refused:
        return Outcome(kind, "refused", str(refused))
    except Exception as error:  # noqa: BLE001  whatever specchat or transformers raises is the finding
        return Outcome(kind, "broken", f"{trial.step}: {_cause(error)}")


class _Trial:
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.step = ""

    def run(self) -> str:
        """Returns what was compared."""
        self.step = "check of the whole size"
        self._check(self._whole_size())
        self.step = "tiny configuration"
        config = tiny_config(self.kind)
        name = model_class(config).__name__
        done = []
        for variant, twin in self._variants(config):
            self.step = f"{name}{variant}"
            done.append(self._compare(twin))
            shutil.rmtree(self.folder, ignore_errors=True)
        return "; ".join(done)

    def _whole_size(self) -> ModelSource:
        folder = self.folder / "whole"
        folder.mkdir(parents=True)
        try:
            default_config(self.kind).save_pretrained(folder)
        except Exception:  # noqa: BLE001  a type of several parts that has no defaults
            (folder / "config.json").write_text(f'{{"model_type": "{self.kind}"}}')
        return ModelSource(self.kind, folder)

    def _check(self, source: ModelSource) -> None:
        try:
            check_model(source)
        except UnsupportedModelError as error:
            raise _RefusedError(_in_words(error.message)) from error

    def _variants(self, config: Any) -> list[tuple[str, Any]]:
        """The configuration with tied and untied embeddings if the class knows both; its own first."""
        if not getattr(model_class(config), "_tied_weights_keys", None):
            return [("", config)]
        own = bool(getattr(config, "tie_word_embeddings", False))
        variants = [(" tied" if own else " untied", config)]
        with suppress(StrictDataclassClassValidationError):  # DBRX refuses tied embeddings
            variants.append((" untied" if own else " tied", with_tie(config, not own)))
        return variants

    def _compare(self, config: Any) -> str:
        """Compare texts with all layers resident, with half of them and with all of them streamed."""
        target, draft, text = self._models(config)
        try:
            num_layers = inspect_model(target, "none").num_layers
            counts = [
                self._steps(target, draft, text, resident, num_layers)
                for resident in (range(num_layers), range(0, num_layers, 2), ())
            ]
        except UnsupportedModelError as error:
            reason = _in_words(error.message)
            raise _BrokenError(f"refused, while the whole size is accepted: {reason}") from error
        return f"{NUM_TOKENS * len(counts)} tokens in {sum(counts)} steps"

    def _models(self, config: Any) -> tuple[ModelSource, ModelSource, _Text]:
        """A target, its draft, and what transformers writes with the target's files: a text of many words."""
        model = model_class(config)._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        folder = self.folder / "target"
        prompt = random_prompt(_PROMPT_ROWS, _PROMPT_VOCAB)
        for embedding_std, penalty in _ATTEMPTS:
            target = save(randomize(model, embedding_std=embedding_std), folder)
            torch.save({}, folder / "spk_dict.pt")  # Qwen 2.5 Omni wants a file of speakers
            loaded = model_class(config).from_pretrained(folder, dtype=torch.float32)
            if not _are_equal(loaded, model):  # ShieldGemma 2: transformers does not find the names that it has written
                loaded = model
            sampling = Sampling(repetition_penalty=penalty)
            expected = reference.generate(_writer(loaded.eval()), prompt, sampling, NUM_TOKENS)
            if len(set(expected.tokens)) >= _FEWEST_WORDS:
                return target, save(perturbed(model, 0.02), self.folder / "draft"), _Text(sampling, expected)
        raise _BrokenError(f"transformers writes a text that compares little: {expected.tokens}")

    def _steps(self, target, draft, text, resident, num_layers) -> int:
        """Compare one text; returns the number of steps it took."""
        plan = make_plan(target, draft, num_layers=num_layers, resident=resident, chunk_rows=_CHUNK_ROWS)
        with load_planned(target, draft, plan, Quiet()) as engine:
            ours, steps = write(engine, text.expected.prompt, text.sampling, NUM_TOKENS)
        difference = text.expected.first_difference(ours)
        where = f"with {len(plan.placement.resident)} of {num_layers} layers resident"
        if difference is not None and not text.expected.is_near_tie(difference):
            margin = text.expected.margins[difference]
            raise _BrokenError(f"token {difference} differs {where} (margin {margin:.2g})")
        if len(steps) == NUM_TOKENS:
            raise _BrokenError(f"no drafted token is accepted {where}")
        return len(steps)


def _are_equal(one: Any, other: Any) -> bool:
    tensors = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in tensors)


def _writer(model: Any) -> Any:
    """The part of a model that writes text: a few wrappers insist on an image, or speak."""
    if hasattr(model, "thinker"):  # beside a part that speaks
        return model.thinker
    insists = next(iter(inspect.signature(model.generate).parameters)) == "pixel_values"
    return model.language_model if insists else model


def _without_timm() -> None:
    """Leave out image encoders that another library, timm, would make: text does not pass through them."""
    from transformers.models.timm_wrapper import modeling_timm_wrapper as timm_wrapper

    def build_nothing(self: Any, config: Any) -> None:
        super(timm_wrapper.TimmWrapperModel, self).__init__(config)

    timm_wrapper.TimmWrapperModel.__init__ = build_nothing


def _in_words(message: str) -> str:
    """The reason without the name of the type, if it is in words and on one line."""
    names = [name for name in _EXCEPTIONS if name in message]
    if names or "\n" in message or len(message) > _LONGEST_REASON or "object has no attribute" in message:
        raise _BrokenError(f"a reason that is not in words: {message}")
    return re.sub(r"^'[\w.-]+' ", "", message)  # its own name, or the one of its text half


def _cause(error: Exception) -> str:
    if isinstance(error, _BrokenError):
        return str(error)
    if isinstance(error, SpecchatError):
        return error.message
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/specchat/" in frame.filename]
    frame = (ours or frames)[-1]
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]} ({'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno})"
