"""Number formats of quantized matrices, one file each, and the checkpoints that come quantized."""
