"""What a model needs: bytes of weights, caches and activations, from its configuration alone."""
