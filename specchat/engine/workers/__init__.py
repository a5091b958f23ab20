"""Layers on several machines: each computes its layers, and only rows travel between them."""
