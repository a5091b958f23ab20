"""Checkpoints on disk: safetensors headers, tensor reads, dtypes, and the layout of a layer's blob."""
