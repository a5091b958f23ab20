"""Models: names, files, quantization, packs and sizes."""
