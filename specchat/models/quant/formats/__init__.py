"""Quantization formats: the tensors that a matrix is stored in, and its numbers."""
