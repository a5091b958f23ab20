"""Deciding what goes where before any byte moves."""
