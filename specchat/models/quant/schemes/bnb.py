"""bitsandbytes checkpoints: 4 bits (NF4, FP4; absmax nested or not; bytes in any dtype) and 8 bits (LLM.int8).

specchat reads the weights of LLM.int8. That library also rounds activations to 8 bits, which the file does not need.

Source: the file format of bitsandbytes 0.50; QLoRA, arXiv 2305.14314; LLM.int8, arXiv 2208.07339.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specchat.models.checkpoint.safetensors import TensorInfo
from specchat.models.quant.formats.affine import Affine
from specchat.models.quant.formats.base import WeightFormat
from specchat.models.quant.formats.nf4 import NESTED_BLOCK, Bnb4
from specchat.models.quant.kernels.bnb import bnb, dynamic_map
from specchat.models.quant.kernels.chunked import Segments
from specchat.models.quant.schemes.settings import SchemeSettings, expect, fail_contents, fill, is_plain

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS: tuple[Literal["nf4", "fp4"], ...] = ("nf4", "fp4")
# 64 comes first: a small matrix can have the same number of blocks with several block sizes. The block size that the
# file names is checked later.
_BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
_STEPS = 127  # LLM.int8's steps from 0 to the largest value of a row


@dataclass(frozen=True)
class BnbScheme:
    """Storage of matrices as config.json describes it.

    Attributes:
        bits: 4 or 8.
    """

    bits: int

    @classmethod
    def of(cls, settings: SchemeSettings) -> "BnbScheme":
        """Parse a quantization_config.

        Raises:
            CorruptCheckpointError: a value is invalid.
        """
        four, eight = settings.flag("load_in_4bit", False), settings.flag("load_in_8bit", False)
        if four == eight:
            settings.fail("load_in_4bit", four, "the opposite of load_in_8bit")
        return cls(4 if four else 8)

    @property
    def name(self) -> str:
        """Name for users."""
        return f"bitsandbytes {self.bits}-bit"

    def format_of(self, module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat | None:
        """Return the format of one matrix; see `CheckpointScheme`."""
        marks = ("weight.", "SCB")  # next to these tensors, a `weight` of any dtype holds codes
        if not any(name.startswith(marks) for name in tensors) and is_plain(module, shape, tensors):
            return None
        return _four_bit_format(module, shape, tensors) if self.bits == 4 else _int8_format(module, shape, tensors)

    def transcode(self, module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
        """Fill the segments of one matrix; see `CheckpointScheme`."""
        if self.bits == 4:
            _transcode_four_bit(module, shape, tensors, segments)
            return
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            fail_contents(module, "weight_format", "is not row-major, the only layout that newer versions write")
        segments["codes"].copy_(tensors["weight"])
        fill(segments["scales"], tensors["SCB"] * (1 / _STEPS))


def _int8_format(module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat:
    expect(module, tensors, "weight", ("I8",), shape)
    expect(module, tensors, "SCB", ("F32",), (shape[0],))
    return Affine(8, None, torch.float32)


def _four_bit_format(module: str, shape: tuple[int, int], tensors: Mapping[str, TensorInfo]) -> WeightFormat:
    numbers = math.prod(shape)
    weight = expect(module, tensors, "weight", ("U8", "I8", "BF16", "F16", "F32", "F64"))
    if weight.nbytes < -(-numbers // 2):
        fail_contents(module, "weight", f"has {weight.nbytes} bytes, too few for {list(shape)} 4-bit values")
    kind = next((kind for kind in _KINDS if _STATE + kind in tensors), None)
    if kind is None:
        expect(module, tensors, _STATE + _KINDS[0], ("U8",))
    assert kind is not None
    nested = "weight.nested_absmax" in tensors
    absmax = expect(module, tensors, "weight.absmax", ("U8",) if nested else ("F32",))
    num_blocks = math.prod(absmax.shape)
    block = next((block for block in _BLOCKS if -(-numbers // block) == num_blocks), None)
    if block is None:
        fail_contents(module, "weight.absmax", f"has {num_blocks} values, which match no block size for {list(shape)}")
    if nested:
        expect(module, tensors, "weight.nested_absmax", ("F32",), (-(-num_blocks // NESTED_BLOCK),))
        expect(module, tensors, "weight.nested_quant_map", ("F32",), (256,))
    return Bnb4(kind, block, nested)


def _transcode_four_bit(module: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], segments: Segments) -> None:
    state_name = next(name for name in tensors if name.startswith(_STATE))
    kind = state_name.removeprefix(_STATE)
    state = _parse_state(module, state_name, tensors[state_name])
    num_blocks = segments["absmax"].numel()
    if -(-math.prod(shape) // state["blocksize"]) != num_blocks or state["quant_type"] != kind:
        fail_contents(
            module,
            state_name,
            f"describes {state['quant_type']} in blocks of {state['blocksize']}, unlike its other tensors",
        )
    if state["shape"] is not None and tuple(state["shape"]) != shape:
        fail_contents(module, state_name, f"describes shape {state['shape']}, but config.json says {list(shape)}")
    _check_map(module, "weight.quant_map", tensors, _four_bit_map(kind))
    packed = tensors["weight"].contiguous().view(-1).view(torch.uint8)
    segments["codes"].copy_(packed[: segments["codes"].numel()])
    fill(segments["absmax"], tensors["weight.absmax"])
    if "offset" in segments:
        if state["nested_blocksize"] != NESTED_BLOCK:
            fail_contents(
                module, state_name, f"describes nested blocks of {state['nested_blocksize']}, not {NESTED_BLOCK}"
            )
        _check_map(module, "weight.nested_quant_map", tensors, dynamic_map(torch.device("cpu")))
        segments["nested_absmax"].copy_(tensors["weight.nested_absmax"])
        segments["offset"].fill_(state["nested_offset"])


def _parse_state(module: str, name: str, data: Tensor) -> dict[str, Any]:
    """Parse the JSON object that bitsandbytes keeps in a tensor of bytes; missing values are None."""
    try:
        state = json.loads(bytes(data.contiguous().view(torch.uint8).tolist()))
        if not isinstance(state["quant_type"], str) or type(state["blocksize"]) is not int or state["blocksize"] < 1:
            raise ValueError(state)
        if "nested_offset" in state and not isinstance(state["nested_offset"], int | float):
            raise ValueError(state)
    except (ValueError, KeyError, TypeError, RecursionError):
        fail_contents(module, name, "is not bitsandbytes' description of a matrix")
    return {"shape": None, "nested_blocksize": None, "nested_offset": 0.0, **state}


def _check_map(module: str, name: str, tensors: Mapping[str, Tensor], known: Tensor) -> None:
    """Check that the file's table of code values is bitsandbytes' own, which the format implies."""
    if name in tensors and not torch.allclose(tensors[name].float(), known, atol=1e-6):
        fail_contents(module, name, "differs from bitsandbytes' own table")


def _four_bit_map(kind: str) -> Tensor:
    """Return the 16 values that codes stand for, float32."""
    bnb()
    from bitsandbytes.functional import get_4bit_type

    numbers: Tensor = get_4bit_type(kind, device="cpu")  # type: ignore[no-untyped-call]
    return numbers
