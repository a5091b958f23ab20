"""Drafters, and the policy that decides the size of their trees."""
