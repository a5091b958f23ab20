"""Streaming of layers that are not resident, anew for every pass."""
