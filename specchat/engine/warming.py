"""Choosing and compiling a GPU's kernels before the first answer.

The first matmul of each kind times all kernels of its format, and may compile one: seconds that the first answer would
take longer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from specchat.models.checkpoint.dtypes import torch_dtype
from specchat.models.hf.skeleton import Skeleton
from specchat.models.quant.modules import QuantLinear, quant_linears
from specchat.records.plan import Workload


@torch.inference_mode()
def warm_up(skeleton: Skeleton, rows: Iterable[int], work: Workload) -> None:
    """Multiply once with each kind of quantized matrix on a GPU; what slots hold does not matter.

    Args:
        skeleton: loaded model.
        rows: numbers of rows that most of its passes will have.
        work: dtype, and rows that the head scores at a time.
    """
    linears = [linear for _, linear in quant_linears(skeleton.model) if _is_on_gpu(linear)]
    if not linears:
        return
    head = skeleton.model.get_output_embeddings()
    kinds = {(linear.format, linear.shape, linear is head): linear for linear in linears}
    for linear in kinds.values():
        device = next(iter(linear.segments.values())).device
        for count in sorted({*rows, work.head_rows} if linear is head else {*rows}):
            linear(torch.zeros(count, linear.in_features, dtype=torch_dtype(work.dtype), device=device))


def _is_on_gpu(linear: QuantLinear) -> bool:
    return all(segment.is_cuda for segment in linear.segments.values())
