"""Whole lines, written to stdout and flushed."""

import sys


def print_line(line: str) -> None:
    """Print a line with its line break, in UTF-8 for every locale."""
    sys.stdout.buffer.write(f"{line}\n".encode())
    sys.stdout.buffer.flush()
