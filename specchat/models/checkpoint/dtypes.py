"""Our names of number formats in torch's."""

import torch

from specchat.records.model import Dtype

TORCH_DTYPE: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
