"""A pair of toy models, target and draft, small enough to ship: specchat can be tried and tested without a download."""
