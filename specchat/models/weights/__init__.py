"""Weights of models: recipes that choose how matrices are stored, and readers that fill layers."""
