"""Figures that engine, planner and probe must agree on."""

from specchat.units import MIB

# Memory of a process that has imported torch and transformers, loaded a model and computed passes, besides the items of
# ledgers: 410 to 445 MiB with CPU builds (torch 2.13), of which 125 MiB are pages of the libraries' files.
RUNTIME_BYTES = 460 * MIB
# What numba adds when it compiles the loops for blocks of GGUF files: 55 MiB, besides pages of its library's file.
COMPILER_BYTES = 60 * MIB

# Rows that the head scores at a time, a workspace that the ledger counts. The walk visits few nodes. Scoring a node
# together with its likeliest descendants reads the head's weights only once.
HEAD_BLOCK_ROWS = 8
# On a GPU the host waits once for each block, and a quantized head is dequantized for each block: 6.5 to 13 ms for a
# vocabulary of 128,256 or 151,936 entries by the memory rates of an RTX 4090 and a 3060.
CUDA_HEAD_BLOCK_ROWS = 32

# Noise rows to keep: drafter and walk use the same few positions ahead. Sequences of one pass share the rows, but each
# keeps enough for a deep tree.
NOISE_ROWS = 64
_LEAST_NOISE_ROWS = 16

# Children that the drafter considers per node.
DRAFT_BRANCH = 16

# Fused attention kernels need a multiple of this number of keys; rows past the end are masked.
ROW_ALIGNMENT = 16

# Workspace while an attention mask is built: boolean masks in bytes per (row, key) beyond the finished mask, and
# positions in bytes per key (three 64-bit integers).
MASK_FLAG_BYTES, MASK_POSITION_BYTES = 2, 24
# Upper bound in bytes per vocabulary entry while the processors run: scores sorted with indices, softmax, sums, masks.
PROCESSING_BYTES = 48
# Bytes per vocabulary entry while one noise row is computed: a few 64-bit integers and doubles.
DRAWING_BYTES = 48
# Copies of the draft's scores while path weights are computed: scaled, noise, sum, scaled, log-softmax; the scores
# themselves are counted separately.
WEIGHING_COPIES = 4
# Bytes per path of growing trees: nine values each, while the best of old paths and new children are selected.
PATH_BYTES = 216

# Tokens of earlier texts that drafts are looked up in, and bytes of host memory for each token of any text.
RETRIEVAL_PAST_TOKENS, RETRIEVAL_TOKEN_BYTES = 32768, 320
# Runs of tokens (for each length of runs) after which the target's best tokens are kept, and bytes for each.
RECYCLED_RUNS, RECYCLED_RUN_BYTES = 3 * 16384, 400
# Tokens whose frequency is known, to draft the lucky ones of them, and bytes of host memory for each: the count, and a
# sorted copy of all counts while the rarer half is dropped.
FREQUENT_TOKENS, FREQUENT_TOKEN_BYTES = 4096, 280

# Rows that one triangular solve of a recurrent layer covers; larger blocks waste more work above the diagonal. Where
# every channel has its own decay, differences of decays are computed for a few rows at a time.
SCAN_BLOCK_ROWS, SCAN_CHANNEL_ROWS = 64, 16

# Copies of its recurrent states that a model keeps in host memory, to go back in a chat. The most suffice for about
# four turns, or for doubling distances over a prompt of 100,000 tokens. The least are the end of the last prompt, where
# an answer is drawn again, and the end of its history, to which templates that strip thinking go back in every turn.
MOST_RESTORE_POINTS, LEAST_RESTORE_POINTS = 12, 2

# States of the target that a head keeps unread for each sequence; longer texts are read before the next pass.
UNREAD_STATES = 64
# Rows on which a head's first choices are compared with the target's, at most at a time.
MOST_CHECKED_ROWS = 96

# Rows of the largest block that a head guesses at once; published DFlash heads have blocks of 8 to 16 rows.
MOST_BLOCK_ROWS = 16

# Longest prompts that the target's own copy reads for a first tree, by kind of device. The target reads longer ones
# alone: on a CPU, every row takes as long as a row of the target's pass.
COPY_PROMPT_ROWS = {"cpu": 64, "cuda": 512}

# Packs are read in chunks of this size, each with its own checksum; the hardware probe measures reads of this size.
READ_CHUNK_BYTES = 16 * MIB
# Queue depth 2 saturates NVMe when idle. Under CPU load threads submit late, so use 4. On an idle machine, 2 to 4
# threads read equally fast here (2.5 GB/s, 16 MiB each).
READ_THREADS = 4

# Threads that read layers from checkpoint shards: each reads a window and copies the tensors into the slot. Packs are
# read directly into slots by `READ_THREADS`. A third thread gains 10% here and needs one more window of memory.
NUM_READERS = 2

# Bytes of a checkpoint shard that each thread reads at a time, into a window of its own.
READ_WINDOW_BYTES = 8 * MIB

# Most bytes of one read of experts, into a window of each of `READ_THREADS`.
EXPERT_WINDOW_BYTES = 4 * MIB
# Windows of a GPU's host: each thread reads into one while another is copied to the device.
EXPERT_WINDOWS = 2 * READ_THREADS

# Row counts of the matmuls that the probe measures; the planner interpolates between them. They span the tree sizes.
MATMUL_ROWS = (1, 16, 64, 256, 512)


def padded_rows(num_rows: int) -> int:
    """Return `num_rows` rounded up to the row alignment of the KV cache."""
    return -(-num_rows // ROW_ALIGNMENT) * ROW_ALIGNMENT


def draft_width(tree_budget: int, num_sequences: int = 1) -> int:
    """Return how many nodes one draft pass expands; wider passes expand more nodes that later drop out of the trees.

    Measured on the demo pair, budget 64, t=0.7: width 32 gives 4.77 tokens per step, 16 gives 5.11, 8 gives 5.16.
    """
    return max(8, tree_budget // 8, 4 * num_sequences)


def noise_rows(num_sequences: int) -> int:
    """Return the noise rows that each sequence of a pass keeps."""
    return max(NOISE_ROWS // num_sequences, _LEAST_NOISE_ROWS)


def head_block_rows(block_rows: int, num_sequences: int) -> int:
    """Return the rows of one sequence that the head scores at a time.

    The walks of all sequences go down together, so each call of the head serves all. Blocks shrink where many share a
    call: four times a single walk's rows suffice, because most walks end within two or three calls.
    """
    return min(block_rows, max(4 * block_rows // num_sequences, 2))


def is_sensitive(name: str, layer: int, num_layers: int) -> bool:
    """Return whether rounding errors of a matrix change scores more than those of others: int3 stores it in int4.

    Experts are never sensitive: all layers have to store them in the same way.

    Args:
        name: last part of the path of the matrix's module.
        layer: index of the decoder layer.
        num_layers: number of decoder layers.
    """
    return name == "v_proj" or layer in {0, num_layers - 1}
