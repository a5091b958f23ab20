"""Which checkpoint tensors fill which parameters, by the renaming and conversion rules of transformers."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from specchat.errors import CorruptCheckpointError, is_lack_of_memory
from specchat.models.hf.skeleton import Skeleton, modules_lock


@dataclass(frozen=True)
class WeightPlan:
    """Which checkpoint tensors fill which parameters.

    Attributes:
        direct: per layer, parameter or buffer name within the layer -> checkpoint key, where a copy is enough.
        converted: per layer, the parameters that transformers merges from several tensors (fused experts), by name
            within the layer (the first one, where one conversion fills several), and the checkpoint keys of each.
        rest: checkpoint keys of everything outside the layers -> parameter or buffer.
        places: checkpoint key -> where it is in its parameter, of those in `converted` that are only put together.
    """

    direct: tuple[Mapping[str, str], ...]
    converted: tuple[Mapping[str, Sequence[str]], ...]
    rest: Mapping[str, str]
    places: Mapping[str, "ModulePlace"]


def plan_weights(skeleton: Skeleton, keys: Iterable[str]) -> WeightPlan:
    """Sorts checkpoint keys by the renaming and conversion rules that transformers has for this architecture."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _weight_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stacking = _stacking(converters)
    known = skeleton.model.state_dict()
    prefix = skeleton.model.base_model_prefix
    places: dict[str, ModulePlace] = {}
    direct: list[dict[str, str]] = [{} for _ in skeleton.layers]
    converted: list[dict[str, list[str]]] = [{} for _ in skeleton.layers]
    rest: dict[str, str] = {}
    in_layer = re.compile(re.escape(skeleton.layers_name) + r"\.(\d+)\.(.+)")
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            continue  # rotary tables of old checkpoints, heads of other tasks, extra prediction layers
        match = in_layer.fullmatch(name)
        if match is None:
            rest[key] = name
        elif pattern is None:
            direct[int(match[1])][match[2]] = key
        else:
            converted[int(match[1])].setdefault(match[2], []).append(key)
            if pattern in stacking:
                places[key] = _place(name, key, pattern, stacking[pattern])
    return WeightPlan(tuple(direct), tuple(converted), rest, places)


@dataclass(frozen=True)
class ModulePlace:
    """Where in the model a matrix of the checkpoint belongs.

    Attributes:
        path: of a module with a `weight`, or of the parameter that fuses the matrices of experts.
        expert: which of them; 0 for others.
        part: which of the parts that are put together, from the first row to the last.
        num_parts: how many there are, of equal size.
    """

    path: str
    expert: int = 0
    part: int = 0
    num_parts: int = 1


def locate_modules(skeleton: Skeleton, modules: Iterable[str]) -> dict[str, ModulePlace]:
    """Finds the places of a checkpoint's modules that have a `weight`, by the rules of `plan_weights`.

    Args:
        skeleton: nothing in it has been replaced.
        modules: their paths in the checkpoint.

    Returns:
        By module; those that the model does not have, or merges in ways unknown here, are left out.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = _weight_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stacking = _stacking(converters)
    known = skeleton.model.state_dict()
    places = {}
    for module in modules:
        key = f"{module}.weight"
        name, pattern = rename_source_key(key, renamings, converters, skeleton.model.base_model_prefix, known)
        if name not in known:
            continue
        if pattern is None:
            places[module] = ModulePlace(name.removesuffix(".weight"))
        elif pattern in stacking:
            places[module] = _place(name, key, pattern, stacking[pattern])
    return places


def _place(name: str, key: str, pattern: str, converter: Any) -> ModulePlace:
    """Where a tensor of one expert belongs, by the rule that it goes through."""
    expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
    assert expert is not None
    patterns = converter.source_patterns
    return ModulePlace(name, int(expert[1]), patterns.index(pattern), len(patterns))


def _stacking(converters: Iterable[Any]) -> dict[str, Any]:
    """The rules that only put experts' tensors together, by what they ask for."""
    return {pattern: entry for entry in converters if _stacks(entry) for pattern in entry.source_patterns}


def _stacks(converter: Any) -> bool:
    """Whether tensors of experts are stacked, after those of one expert were put one above the other."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    return operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _weight_mapping(skeleton: Skeleton) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping: list[Any] = get_model_conversion_mapping(skeleton.model)
    return mapping


class TensorWhenAsked:
    """A tensor that is read when a conversion gets to it, and forgotten by whoever holds only this.

    Args:
        read: returns it.
    """

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


def load_converted(
    skeleton: Skeleton, tensors: Mapping[str, torch.Tensor | TensorWhenAsked], dtype: torch.dtype
) -> None:
    """Loads checkpoint tensors into the skeleton's parameters through transformers' conversions.

    Raises:
        CorruptCheckpointError: a shape does not fit, or tensors that belong together are not all there.
        MemoryError: there is not enough for a conversion.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    settings = LoadStateDictConfig(dtype=dtype, weight_mapping=_weight_mapping(skeleton), device_map={"": "cpu"})
    with modules_lock, _quiet(), _without_threads():
        info, _ = convert_and_load_state_dict_in_model(skeleton.model, dict(tensors), settings)
    if any(_lacks_memory(text) for text in info.conversion_errors.values()):
        raise MemoryError
    problems = [str(p) for p in (*info.mismatched_keys, *info.conversion_errors, *info.error_msgs)]
    if problems:
        raise CorruptCheckpointError(f"tensors do not fit the configuration: {', '.join(sorted(problems)[:3])}")


# Its threads gain nothing here, for tensors are at hand or read in order; and where memory is short, waiting for a
# thread that died on its way has no end.
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def _lacks_memory(trace: str) -> bool:
    """Whether an error, of which transformers keeps only the text, was for lack of memory."""
    return "MemoryError" in trace or is_lack_of_memory(RuntimeError(trace))


@contextmanager
def _without_threads() -> Iterator[None]:
    """No threads of transformers."""
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_THREADS]
        else:
            os.environ[_NO_THREADS] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers on stderr."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
