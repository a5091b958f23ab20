"""Products with matrices, plain and quantized."""
