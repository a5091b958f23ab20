"""Figures that engine, planner and probe must agree on."""

from specchat.units import MIB

# Workspaces of the engine that the ledger counts. Visited nodes are few; scoring a node's likeliest descendants along
# with it costs the head's weights only once.
HEAD_BLOCK_ROWS = 8

# Rows of noise that are kept; drafter and walk look at the same few positions ahead.
NOISE_ROWS = 64

# Children that the drafter considers per node.
DRAFT_BRANCH = 16

# Fused kernels want the number of keys to be a multiple of this; rows past the end are masked.
ROW_ALIGNMENT = 16

# While a mask is built, truth values live beside it: bytes for each row and key more than the finished mask has. So do
# positions of the keys, three 64-bit numbers each.
MASK_FLAG_BYTES, MASK_POSITION_BYTES = 2, 24
# One row of scores on its way through the processors: sorted with its indices, softmax, sums, masks; at most.
PROCESSING_BYTES = 48
# Making one row of noise: 64-bit integers and doubles, a few at a time.
DRAWING_BYTES = 48
# The draft's scores turn into weights of paths: scaled, noise, sum, scaled, log-softmax; scores themselves apart.
WEIGHING_COPIES = 4
# Paths of a growing tree: five numbers each, while the best are chosen among old ones and new children.
PATH_BYTES = 120

# Packs are read in pieces of this size, each of which has a checksum, and the probe measures such reads.
READ_CHUNK_BYTES = 16 * MIB
# Two requests in flight keep an NVMe drive busy, but while the processor is, a thread that has to begin the next one
# comes late: two more are under way by then. Alone, 2 to 4 threads read equally fast here (2.5 GB/s, 16 MiB each).
READ_THREADS = 4

# Threads that read layers from files that are not laid out for it: each copies what it has read to its place. Packs are
# read into their places, by `READ_THREADS`. A third one gains a tenth here, and takes a window more.
NUM_READERS = 2

# What each of them reads at a time of a file that is not laid out for it, into memory of its own.
READ_WINDOW_BYTES = 8 * MIB

# Rows of products that the probe measures and the planner interpolates between; trees have as many.
MATMUL_ROWS = (1, 16, 64, 256, 512)


def padded_rows(num_rows: int) -> int:
    """Return the rows that a cache of `num_rows` takes: rounded up to the alignment."""
    return -(-num_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT


def draft_width(tree_budget: int) -> int:
    """Nodes that one pass of the draft expands: an early guess at which nodes stay wastes rows and passes.

    Measured on the demo pair, budget 64, t=0.7: 32 4.77, 16 5.11, 8 5.16 tokens per step.
    """
    return max(8, tree_budget // 8)
