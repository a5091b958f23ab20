"""Layers that are streamed for every pass."""
