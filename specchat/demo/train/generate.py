"""Let the target write chats, so that the draft is distilled on the text that it will draft.

    python -m specchat.demo.train.generate --model run/target --data data --out data/written.npy

Each row starts with the beginning of a training chat; the target writes the rest, chat after chat.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from specchat.demo.train.batches import TokenFile
from specchat.demo.train.checkpoint import load
from specchat.demo.train.model import KeyValueCache, Llama
from specchat.demo.train.options import parse, resolve_device
from specchat.demo.train.prepare import write_tokens

TEMPERATURES = (0.7, 1.0)  # a common value, and a higher one, so that the draft also sees mistakes of the target


@dataclass(frozen=True)
class GenerateOptions:
    """Write chats with a trained target."""

    model: Annotated[Path, "folder of the target"]
    data: Annotated[Path, "folder that prepare wrote"]
    out: Annotated[Path, "the .npy file to write"]
    tokens: Annotated[int, "stop after this many tokens"] = 300_000
    batch: Annotated[int, "rows written side by side"] = 128
    length: Annotated[int, "tokens per row"] = 384
    prompt: Annotated[int, "tokens of a training chat that each row begins with"] = 24
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    seed: Annotated[int, "seed of the sampling"] = 11


@torch.inference_mode()
def sample(model: Llama, prompts: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Continue the prompts with tokens sampled from the model; return int64 [rows, length].

    Args:
        model: model that writes.
        prompts: token ids, int64 [rows, prompt].
        length: tokens per row, including the prompt.
        temperature: sampling temperature, above 0.
        generator: random generator on the model's device.
    """
    cache = KeyValueCache(model, len(prompts), length)
    parts = [prompts]
    for _ in range(length - prompts.shape[1]):
        probabilities = (model(parts[-1], cache)[:, -1].float() / temperature).softmax(-1)
        parts.append(torch.multinomial(probabilities, 1, generator=generator))
    return torch.cat(parts, dim=1)


def generate(options: GenerateOptions) -> int:
    """Write the token file and return its number of tokens."""
    device = resolve_device(options.device)
    model = load(options.model, device, torch.bfloat16)
    chats = options.data / "chats.npy"
    source = TokenFile(chats if chats.is_file() else options.data / "texts.npy")
    generator = torch.Generator(device).manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    length = min(options.length, model.shape.max_position_embeddings)
    rows: list[list[int]] = []
    while len(rows) * length < options.tokens:
        prompts = torch.from_numpy(source.beginnings(options.batch, options.prompt, rng)).to(device)
        temperature = TEMPERATURES[len(rows) // options.batch % len(TEMPERATURES)]
        rows += sample(model, prompts, length, temperature, generator).tolist()
        print(f"{len(rows) * length:,} tokens", flush=True)
    return write_tokens(options.out, rows)


if __name__ == "__main__":
    generate(parse(GenerateOptions))
