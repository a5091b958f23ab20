"""The meaning of a MODEL argument, and facts about models by name; no torch, no network."""
