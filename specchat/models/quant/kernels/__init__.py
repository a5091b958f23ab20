"""Matmul kernels for plain and quantized matrices."""
