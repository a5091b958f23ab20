"""What a MODEL argument means, and what is known about models by name; no torch, no network."""
