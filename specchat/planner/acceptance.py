"""Predict the accepted length of a tree by its number of nodes.

The accepted length grows with the logarithm of the tree size. A node is worth its probability, and the probabilities
of the best unexplored nodes fall as a power of their rank.
"""

import math
from dataclasses import dataclass

from specchat.planner.rates import Basis


@dataclass(frozen=True)
class Acceptance:
    """Expected accepted length of a tree by its number of nodes: `1 + gain ln(1 + nodes / knee)`.

    Attributes:
        gain: additional tokens per e-fold of a large tree.
        knee: number of nodes at which the logarithm sets in.
        basis: origin of the figures: "measured" on this pair, or "typical" of such pairs.
    """

    gain: float
    knee: float
    basis: Basis

    def tokens_per_step(self, nodes: float) -> float:
        """Return the expected tokens of a step, between 1 (the target's own token) and 1 + nodes."""
        return 1.0 if nodes == 0 else min(1.0 + self.gain * math.log1p(nodes / self.knee), 1.0 + nodes)


# SpecExec (arXiv 2406.02532) publishes 13.5 tokens per step for a 70B chat model with a 7B draft and up to 20 at 2,048
# nodes, UMbreLLa about 13 with a 1B draft, SubSpec 11.9 for 7B with 1.5B. The formula gives 8, 11 and 15 at 64, 256
# and 2,048 nodes: rather too low than too high.
TYPICAL_ACCEPTANCE = Acceptance(gain=2.0, knee=1.5, basis="typical")
# Repeats of the text, and the target's own best tokens after the same tokens. Measured with 64 nodes: 1.8 tokens per
# step on the demo's chats, 3.5 and more where the text copies; Token Recycling (arXiv 2408.08696) publishes 2.7.
RETRIEVAL_ACCEPTANCE = Acceptance(gain=0.25, knee=3.0, basis="typical")
# Heads of one layer. Chains of 7 tokens bring 2.8 tokens per step on Qwen3.8-27B (llama.cpp, pull request 27342). Trees
# of 16 and 64 nodes bring 3.2 and 3.9 on the demo, whose head was trained for a few minutes. EAGLE-3 and 3.1 heads
# bring 2.8 and 3.0 tokens per step with chains of 5 on Qwen3-8B (vllm-project/speculators, pull request 610).
HEAD_ACCEPTANCE = Acceptance(gain=0.7, knee=1.0, basis="typical")
# Heads that guess in blocks. 3.7 tokens per step are published for chains of DFlash on Muse-Glimmer-30B, and 22% more
# for trees of 32 nodes than for chains (sgl-project/sglang, pull request 31069). The formula gives 4.1 at 32 nodes, and
# 4.8 at 64.
BLOCK_ACCEPTANCE = Acceptance(gain=0.9, knee=1.0, basis="typical")
# Gain of the target's own copy in 8 or 4 bits, relative to a small draft model. On the demo, a 4-bit copy brings 5.6
# and 9.2 tokens per step with 16 and 64 nodes, a draft model 3.9 and 5.1.
COPY_GAIN = 1.7
# Gain of a draft in 4 bits relative to the same draft as it is. On the demo, trees of 64 nodes bring 6.1 instead of 6.5
# tokens per step at temperature 0.7, and 6.6 instead of 6.9 at 0; in 8 bits they bring 6.6 and 6.9.
INT4_GAIN = 0.93
# Acceptance of the embedded demo pair, from trees of 1, 4, 16, 64 and 128 nodes.
DEMO_ACCEPTANCE = Acceptance(gain=1.0, knee=1.0, basis="typical")
