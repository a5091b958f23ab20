"""What DFlash2 adds to a DFlash head: convolutions within a block, and scores of pairs of tokens.

A convolution stands before and behind the attention and the MLP of each layer. It mixes a row with those before it in
its block: `y_j = k_0 x_j + k_1 x_{j-1}`, by groups of columns, with coefficients that are constant in part and in part
projected from the sublayer's input. The selector adds `<A[parent] * P h_j, B[child]>` to the score of each of the best
tokens of a level (vllm-project/vllm, qwen3_dflash2.py).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specchat.errors import UnsupportedModelError
from specchat.models.checkpoint.dflash import SecondConfig
from specchat.models.hf.skeleton import Skeleton

_PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


class BlockConvolution(torch.nn.Module):
    """A convolution over the rows of a block, before and behind a sublayer.

    Args:
        width: hidden width.
        second: settings of the head's own files.
        dtype: dtype of the parameters.

    Attributes:
        block_rows: rows of each block of a pass.
    """

    def __init__(self, width: int, second: SecondConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.block_rows = 1
        self._shape = 2, second.taps, width // second.group_size
        self._group_size = second.group_size
        self.base_kernel = torch.nn.Parameter(torch.empty(2, second.taps, width, device="meta", dtype=dtype))
        columns = 2 * second.taps * (width // second.group_size)
        self.kernel_projection = torch.nn.Linear(width, columns, bias=False, device="meta", dtype=dtype)

    def coefficients(self, rows: Tensor) -> Tensor:
        """Return the coefficients before and behind a sublayer, [2, taps, 1, S, D], from its input rows [1, S, D]."""
        projected = self.kernel_projection(rows).unflatten(-1, self._shape)
        projected = projected.repeat_interleave(self._group_size, dim=-1)
        return projected.permute(2, 3, 0, 1, 4) + self.base_kernel[:, :, None, None]

    def forward(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Mix rows [1, S, D] with coefficients [taps, 1, S, D]."""
        place = torch.arange(rows.shape[1], device=rows.device) % self.block_rows
        mixed = coefficients[0] * rows
        for tap in range(1, len(coefficients)):
            earlier = F.pad(rows, (0, 0, tap, 0))[:, : rows.shape[1]]
            mixed = mixed + coefficients[tap] * earlier * (place >= tap)[None, :, None]
        return mixed


class DFlash2Layer(torch.nn.Module):
    """A decoder layer of transformers with convolutions around its attention and its MLP.

    Args:
        layer: decoder layer, whose parts are taken over.
        width: hidden width.
        second: settings of the head's own files.
        dtype: dtype of the parameters.
    """

    def __init__(self, layer: Any, width: int, second: SecondConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention_conv = BlockConvolution(width, second, dtype)
        self.mlp_conv = BlockConvolution(width, second, dtype)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Compute rows [1, S, D], with the decoder's keywords."""
        rows = self.input_layernorm(hidden_states)
        before, behind = self.attention_conv.coefficients(rows)
        mixed = self.self_attn(hidden_states=self.attention_conv(rows, before), **kwargs)[0]
        hidden_states = hidden_states + self.attention_conv(mixed, behind)
        rows = self.post_attention_layernorm(hidden_states)
        before, behind = self.mlp_conv.coefficients(rows)
        out: Tensor = hidden_states + self.mlp_conv(self.mlp(self.mlp_conv(rows, before)), behind)
        return out


class CandidateSelector(torch.nn.Module):
    """Scores of pairs of a parent's token and a candidate.

    Args:
        width: hidden width.
        vocab_size: number of tokens.
        second: settings of the head's own files.
        dtype: dtype of the parameters.
    """

    def __init__(self, width: int, vocab_size: int, second: SecondConfig, dtype: torch.dtype) -> None:
        super().__init__()
        codebook = torch.empty(vocab_size, second.rank, device="meta", dtype=dtype)
        self.predecessor_codebook = torch.nn.Parameter(codebook)
        self.successor_codebook = torch.nn.Parameter(codebook.clone())
        self.hidden_projection = torch.nn.Linear(width, second.rank, bias=False, device="meta", dtype=dtype)

    def forward(self, states: Tensor, parents: Tensor, candidates: Tensor) -> Tensor:
        """Return scores, float32 [n, k], of candidates [n, k] below parents [n], given the level's states [n, D]."""
        left = (self.predecessor_codebook[parents] * self.hidden_projection(states)).float()
        columns = [(left * self.successor_codebook[column].float()).sum(-1) for column in candidates.unbind(-1)]
        return torch.stack(columns, dim=-1)


def add_second_parts(skeleton: Skeleton, second: SecondConfig, dtype: torch.dtype) -> None:
    """Add the parts of a DFlash2 head to a causal LM with the head's layers.

    Args:
        skeleton: causal LM, changed in place.
        second: settings of the head's own files.
        dtype: dtype of the parameters.

    Raises:
        UnsupportedModelError: layers of other parts.
    """
    config = skeleton.config
    if not all(hasattr(layer, name) for layer in skeleton.layers for name in _PARTS):
        raise UnsupportedModelError(f"'{config.model_type}' is not a kind of layer that DFlash2 heads are read with")
    for index, layer in enumerate(skeleton.layers):
        skeleton.layers[index] = DFlash2Layer(layer, config.hidden_size, second, dtype)
    skeleton.decoder.candidate_selector = CandidateSelector(config.hidden_size, config.vocab_size, second, dtype)
