"""Experts as the unit of residency: a pool of expert slots, and the reads that fill it."""
