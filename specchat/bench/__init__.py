"""Measurements of speed: its parts, comparisons with baselines, and a check that the text is the target's own."""
