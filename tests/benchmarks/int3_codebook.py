"""Make the codebook of int3: k-means of the magnitudes of four normal numbers, as in its groups.

    PYTHONPATH=. python tests/benchmarks/int3_codebook.py > specchat/models/quant/formats/int3.toml

Takes some minutes. Another version of torch may give a slightly different codebook, and packs depend on it: raise
`_VERSION` of the format when the file changes.
"""

import torch
from torch import Tensor

ENTRIES, WIDTH, GROUP = 512, 4, 128
LARGEST = 127  # seven bits are exact in bfloat16
GROUPS, STEPS = 8192, 50


def samples(generator: torch.Generator) -> Tensor:
    """Magnitudes of normal numbers, divided by their group's root mean square: [n, WIDTH]."""
    numbers = torch.randn(GROUPS, GROUP, generator=generator)
    return (numbers / numbers.square().mean(1, keepdim=True).sqrt()).abs().view(-1, WIDTH)


def nearest(points: Tensor, centers: Tensor) -> Tensor:
    half = centers.square().sum(1) / 2
    return torch.cat([(part @ centers.T - half).argmax(1) for part in points.split(1 << 14)])


def k_means(points: Tensor, generator: torch.Generator) -> Tensor:
    centers = points[torch.randperm(len(points), generator=generator)[:ENTRIES]].clone()
    for _ in range(STEPS):
        index = nearest(points, centers)
        counts = index.bincount(minlength=ENTRIES).clamp(min=1)[:, None]
        centers = torch.zeros_like(centers).index_add_(0, index, points) / counts
    return centers


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = k_means(samples(generator), generator)
    levels = (centers * (LARGEST / centers.max())).round().int()
    order = sorted(levels.tolist())
    text = bytes(level for entry in order for level in entry).hex()
    print("# Written by tests/benchmarks/int3_codebook.py: 512 entries of four magnitudes, a byte each.")
    print(f"per_deviation = {LARGEST / centers.max().item():.4f}")
    print('hex = """\\')
    for begin in range(0, len(text), 112):
        print(f"{text[begin : begin + 112]}\\")
    print('"""')


if __name__ == "__main__":
    main()
