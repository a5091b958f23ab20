"""The records that floors hand to each other: plain data, no torch, printable."""
