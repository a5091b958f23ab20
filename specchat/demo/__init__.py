"""A toy target and a toy draft, small enough to ship, so that specchat can be tried and tested without a download."""
