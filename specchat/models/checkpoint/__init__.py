"""Weights on disk: safetensors headers, tensors read into given memory, and how a layer lies in its blob."""
