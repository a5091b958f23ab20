"""Quantization formats: the tensors that store a matrix, and their dequantization."""
