"""Drafters, and the policy of how far their trees grow."""
