"""From checkpoints to parameters: recipes for matrices, and readers that fill layers."""
