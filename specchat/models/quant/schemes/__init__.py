"""Pre-quantized checkpoints: how each scheme stores a matrix, and its transcoding into a format."""
