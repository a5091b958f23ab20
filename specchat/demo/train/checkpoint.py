"""Models and training states on disk, as safetensors and JSON only."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specchat.demo.train.model import NORM_EPS, Llama, Shape
from specchat.demo.train.tokenizer import BOS_ID, END_ID, PAD_ID, copy_tokenizer
from specchat.errors import UsageError

_TOKEN_IDS = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
_GENERATION = {**_TOKEN_IDS, "do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 200}


def export(model: Llama, tokenizer: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model folder that transformers and specchat can load.

    Args:
        model: model to write.
        tokenizer: folder with the tokenizer files to copy.
        folder: folder to write.
        dtype: dtype of the stored weights.
    """
    copy_tokenizer(tokenizer, folder)
    _write_json(folder / "config.json", _config(model.shape, dtype))
    _write_json(folder / "generation_config.json", _GENERATION)
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    _save(weights, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Llama:
    """Load an exported folder as a lean model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama(Shape(**{field.name: config[field.name] for field in fields(Shape)}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device=device, dtype=dtype)


def save_state(path: Path, tensors: Mapping[str, Tensor], step: int) -> None:
    """Replace a training state. The old state survives if the run is killed while writing.

    Args:
        path: file of the state.
        tensors: weights and optimizer states.
        step: number of finished steps, stored in the same file so that both always match.
    """
    _save(tensors, path, {"step": str(step)})


def load_state(path: Path) -> tuple[dict[str, Tensor], int]:
    """Load the tensors and the step that `save_state` stored.

    Raises:
        UsageError: the file does not exist.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist", hint="start without --resume")
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    return load_file(path), step


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **_TOKEN_IDS,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
