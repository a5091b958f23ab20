"""Packs: a model repacked into one aligned blob per layer."""
