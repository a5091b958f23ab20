"""The matrices of a model that may be stored in a quantization format."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from specchat.models.hf.skeleton import Skeleton, path_of
from specchat.models.quant.experts import experts_forward
from specchat.models.quant.modules import Matrix
from specchat.records.limits import is_sensitive

# Small rounding errors here change which experts compute a row, the weight of a shared expert, or how fast the state of
# a recurrent layer decays. So they stay plain.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})
_GATES = frozenset({"in_proj_ba", "in_proj_a", "in_proj_b", "a_proj", "b_proj", "dt_proj"})


def find_matrices(skeleton: Skeleton) -> list[Matrix]:
    """List the matrices that may be quantized: linears and fused experts of layers and shared blocks, and the head.

    Routers, gates of recurrent layers and subclasses of nn.Linear are left out.
    """
    matrices: list[Matrix] = []
    for index, layer in enumerate(skeleton.layers):
        for matrix in _matrices_of(layer, f"{skeleton.layers_name}.{index}", index):
            leaf = matrix.path.rpartition(".")[2]
            sensitive = not matrix.num_experts and is_sensitive(leaf, index, len(skeleton.layers))
            matrices.append(replace(matrix, is_sensitive=sensitive))
    for path in skeleton.shared_paths:
        matrices += _matrices_of(skeleton.model.get_submodule(path), path, None)
    head = skeleton.model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        shape = head.out_features, head.in_features
        matrices.append(Matrix(path_of(skeleton.model, head), None, shape, is_head=True))
    return matrices


def find_lookup(skeleton: Skeleton) -> Matrix | None:
    """Return the table of the input embeddings; None for a model without, or with another way to look tokens up."""
    try:
        embeddings = skeleton.model.get_input_embeddings()
    except NotImplementedError:  # an architecture that does not name its embeddings
        return None
    if not isinstance(embeddings, torch.nn.Embedding):
        return None
    shape = embeddings.num_embeddings, embeddings.embedding_dim
    return Matrix(path_of(skeleton.model, embeddings), None, shape, is_lookup=True)


def plain_linears(layer: Any) -> Iterator[Any]:
    """Yield the linear layers of a decoder layer whose weights only their own forward reads."""
    yield from (module for path, module in layer.named_modules() if _is_linear(path, module))


def _is_linear(path: str, module: Any) -> bool:
    return type(module) is torch.nn.Linear and path.rpartition(".")[2] not in _ROUTERS | _GATES


def _matrices_of(part: Any, prefix: str, layer: int | None) -> Iterator[Matrix]:
    for path, module in part.named_modules(prefix=prefix):
        if _is_linear(path, module):
            yield Matrix(path, layer, (module.out_features, module.in_features))
        elif _fuses_experts(module):
            yield from _expert_matrices(path, layer, module)


def _fuses_experts(module: Any) -> bool:
    """Return whether transformers allows another implementation of the module's experts.

    transformers 5.17 and 5.18 know no norms after experts, and their modules have no such attribute.
    """
    is_fused = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return is_fused and not getattr(module, "has_post_expert_norm", False)


def _expert_matrices(path: str, layer: int | None, module: Any) -> Iterator[Matrix]:
    for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
        num_experts, *shape = getattr(module, name).shape
        rows, cols = reversed(shape) if module.is_transposed else shape
        yield Matrix(f"{path}.{name}", layer, (rows, cols), num_experts, module.is_transposed)


def use_quantized_experts(skeleton: Skeleton) -> None:
    """Replace the forward of modules whose fused experts have been quantized."""
    for module in skeleton.layers.modules():
        if _fuses_experts(module) and isinstance(module.down_proj, torch.nn.ModuleList):
            module.forward = partial(experts_forward, module)
