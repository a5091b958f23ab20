"""Sizes of models: bytes of weights, KV cache entries and activations, from the configuration alone."""
