"""Decide where every layer and cache lives before any byte moves."""
