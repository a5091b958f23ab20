"""Quantized matrices: how their bytes lie, how checkpoints store them, and how they are multiplied with."""
