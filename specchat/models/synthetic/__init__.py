"""Synthetic models of any shape."""
