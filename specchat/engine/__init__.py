"""Exact generation: token ids in, the token ids that the target alone would write out."""
