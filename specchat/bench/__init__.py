"""Measuring: how fast it is here, why, against what, and whether the text is still exactly the target's."""
