"""The mapping from checkpoint tensors to parameters, by transformers' renaming and conversion rules."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from specchat.errors import CorruptCheckpointError, is_lack_of_memory
from specchat.models.hf.skeleton import Skeleton, modules_lock
from specchat.models.hf.wrappers import text_keys, wrapper_mapping, wrapper_type


@dataclass(frozen=True)
class WeightPlan:
    """The mapping from checkpoint tensors to parameters.

    Attributes:
        direct: parameter or buffer name within the layer -> key of the checkpoint tensor to copy, for each layer.
        converted: name within the layer -> keys of the checkpoint tensors that transformers merges into the parameter
            (fused experts), for each layer. If one conversion fills several parameters, the name is the first one's.
        rest: checkpoint key -> parameter or buffer, for everything outside the layers.
        places: checkpoint key -> place in its parameter, for tensors in `converted` that are only stacked.
    """

    direct: tuple[Mapping[str, str], ...]
    converted: tuple[Mapping[str, Sequence[str]], ...]
    rest: Mapping[str, str]
    places: Mapping[str, "ModulePlace"]


def plan_weights(skeleton: Skeleton, keys: Iterable[str], *, is_pack: bool = False) -> WeightPlan:
    """Map checkpoint keys to parameters by transformers' renaming and conversion rules for the architecture.

    Args:
        skeleton: skeleton of the model.
        keys: keys of the tensors.
        is_pack: whether tensors that have the name of a parameter are the parameter, already merged and cast. Some
            rules keep a tensor's name, so they would convert it twice.
    """
    names = _Names(skeleton, own_names_first=is_pack)
    places: dict[str, ModulePlace] = {}
    direct: list[dict[str, str]] = [{} for _ in skeleton.layers]
    converted: list[dict[str, list[str]]] = [{} for _ in skeleton.layers]
    rest: dict[str, str] = {}
    shared = _SharedNames(skeleton)
    in_layer = re.compile(re.escape(skeleton.layers_name) + r"\.(\d+)\.(.+)")
    for key in keys:
        found = names.find(key)
        if found is None or shared.is_copy(found.name):
            continue  # not used: rotary tables of old checkpoints, heads for other tasks, extra layers, images
        match = in_layer.fullmatch(found.name)
        if match is None:
            rest[key] = found.name
        elif found.pattern is None:
            direct[int(match[1])][match[2]] = key
        else:
            converted[int(match[1])].setdefault(match[2], []).append(key)
            if (place := names.place(found)) is not None:
                places[key] = place
    return WeightPlan(tuple(direct), tuple(converted), rest, places)


class _SharedNames:
    """The parameters of shared blocks that have a tensor; checkpoints may store a block for each layer that uses it."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._prefixes = tuple(f"{path}." for path in skeleton.shared_paths)
        self._filled: set[str] = set()

    def is_copy(self, name: str) -> bool:
        """Return whether an earlier tensor fills a parameter of a shared block."""
        if not name.startswith(self._prefixes):
            return False
        known = name in self._filled
        self._filled.add(name)
        return known


@dataclass(frozen=True)
class ModulePlace:
    """The place in the model of one matrix of the checkpoint.

    Attributes:
        path: path of a module with a `weight`, or of a parameter that fuses the matrices of experts.
        expert: index of the expert; 0 without experts.
        part: index of the row range that the matrix fills, from the first row to the last.
        num_parts: number of row ranges, all of equal size.
    """

    path: str
    expert: int = 0
    part: int = 0
    num_parts: int = 1


def locate_modules(skeleton: Skeleton, modules: Iterable[str]) -> dict[str, ModulePlace]:
    """Return the places in the model of checkpoint modules with a `weight`, by the rules of `plan_weights`.

    Args:
        skeleton: skeleton whose modules have not been replaced.
        modules: paths of the modules in the checkpoint.

    Returns:
        Places by module, without modules that the model lacks or merges in other ways than stacking.
    """
    names = _Names(skeleton)
    places = {}
    for module in modules:
        found = names.find(f"{module}.weight")
        if found is None:
            continue
        place = ModulePlace(found.name.removesuffix(".weight")) if found.pattern is None else names.place(found)
        if place is not None:
            places[module] = place
    return places


@dataclass(frozen=True)
class _Found:
    """A parameter or buffer, and the tensor that fills it.

    Attributes:
        name: name in the model.
        key: key of the tensor as the model alone would save it, without the prefixes of a multimodal checkpoint.
        pattern: source pattern of the conversion that merges the tensor; None for a tensor to copy.
    """

    name: str
    key: str
    pattern: str | None


class _Names:
    """transformers' rules from the keys of a checkpoint to the parameters and buffers of a model."""

    def __init__(self, skeleton: Skeleton, *, own_names_first: bool = False) -> None:
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = _weight_mapping(skeleton)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        # Rules that only stack experts' tensors.
        self._stacking = {p: entry for entry in self._converters if _stacks(entry) for p in entry.source_patterns}
        self._known = skeleton.model.state_dict()
        self._own_names_first = own_names_first
        self._prefix = skeleton.model.base_model_prefix
        self._is_part = wrapper_type(skeleton.config) is not None
        self._outer = [rule for rule in wrapper_mapping(skeleton.config) if isinstance(rule, WeightRenaming)]

    def find(self, key: str) -> _Found | None:
        """Return the parameter or buffer that a tensor fills or is merged into; None if the model does not use it."""
        from transformers.core_model_loading import rename_source_key

        if self._own_names_first and key in self._known:
            return _Found(key, key, None)
        for inner in self._inner_keys(key):
            for rules in ((self._renamings, self._converters), ([], [])):
                name, pattern = rename_source_key(inner, *rules, self._prefix, self._known)
                if name in self._known:
                    return _Found(name, inner, pattern)
        return None

    def place(self, found: _Found) -> ModulePlace | None:
        """Return the place of one expert's tensor; None if it is merged in other ways than stacking."""
        if found.pattern not in self._stacking:
            return None
        patterns = self._stacking[found.pattern].source_patterns
        pattern = found.pattern.replace("\\.", ".")  # some rules escape their dots
        expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), found.key)
        assert expert is not None
        return ModulePlace(found.name, int(expert[1]), patterns.index(found.pattern), len(patterns))

    def _inner_keys(self, key: str) -> list[str]:
        from transformers.core_model_loading import rename_source_key

        if not self._is_part:
            return [key]
        return [*text_keys(rename_source_key(key, self._outer, [])[0]), *text_keys(key)]


def _stacks(converter: Any) -> bool:
    """Return whether a rule only stacks experts, after it concatenates the rows of each expert's tensors."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    return operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _weight_mapping(skeleton: Skeleton) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping: list[Any] = get_model_conversion_mapping(skeleton.model)
    mapping += [rule for rule in wrapper_mapping(skeleton.config) if isinstance(rule, WeightConverter)]
    return mapping + [
        WeightRenaming(rf"\b{re.escape(use)}\.", f"{block.path}.")
        for block in skeleton.shared_blocks
        for use in block.uses
    ]


class LazyTensor:
    """A tensor that is read when a conversion accesses it, and that is not kept afterwards.

    Args:
        read: returns the tensor.
    """

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self._read()


def load_converted(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor | LazyTensor], dtype: torch.dtype) -> None:
    """Load checkpoint tensors into the skeleton's parameters by transformers' conversions.

    Raises:
        CorruptCheckpointError: wrong shapes, or missing tensors among those that are merged.
        MemoryError: too little memory for a conversion.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    names = _Names(skeleton)
    found = {key: names.find(key) for key in tensors}
    inner = {key if each is None else each.key: tensors[key] for key, each in found.items()}
    settings = LoadStateDictConfig(dtype=dtype, weight_mapping=_weight_mapping(skeleton), device_map={"": "cpu"})
    with modules_lock, _quiet(), _without_threads():
        info, _ = convert_and_load_state_dict_in_model(skeleton.model, inner, settings)
    if any(_lacks_memory(text) for text in info.conversion_errors.values()):
        raise MemoryError
    problems = [str(p) for p in (*info.mismatched_keys, *info.conversion_errors, *info.error_msgs)]
    if problems:
        raise CorruptCheckpointError(f"tensors do not match the configuration: {', '.join(sorted(problems)[:3])}")


# transformers' loading threads gain nothing here: tensors are in memory or are read in order. If memory runs out, the
# wait for a dead thread never ends.
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def _lacks_memory(trace: str) -> bool:
    """Return whether an error was due to a lack of memory; transformers keeps only its text."""
    return "MemoryError" in trace or is_lack_of_memory(RuntimeError(trace))


@contextmanager
def _without_threads() -> Iterator[None]:
    """Turn transformers' loading threads off within the scope."""
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
    """Turn transformers' progress bars on stderr off within the scope."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
