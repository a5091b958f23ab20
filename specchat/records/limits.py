"""Figures that engine and planner must agree on."""

# Workspaces of the engine that the ledger counts. Visited nodes are few; scoring a node's likeliest descendants along
# with it costs the head's weights only once.
HEAD_BLOCK_ROWS = 8

# Rows of noise that are kept; drafter and walk look at the same few positions ahead.
NOISE_ROWS = 64

# Threads that read layers from files that are not laid out for it: each copies what it has read to its place. Packs are
# read into their places, by `hardware.disk.READ_THREADS`. A third one gains a tenth here, and takes a window more.
NUM_READERS = 2

# What each of them reads at a time of a file that is not laid out for it, into memory of its own.
READ_WINDOW_BYTES = 8 * 2**20


def draft_width(tree_budget: int) -> int:
    """Nodes that one pass of the draft expands: an early guess at which nodes stay wastes rows and passes.

    Measured on the demo pair, budget 64, t=0.7: 32 4.77, 16 5.11, 8 5.16 tokens per step.
    """
    return max(8, tree_budget // 8)
