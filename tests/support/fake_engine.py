"""An engine that says what it is told to, and a tokenizer of bytes: chats without a model."""

from collections.abc import Callable
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from specchat.errors import PromptTooLongError
from specchat.planner.cost import Prediction
from specchat.planner.explain import Alternative, Choice, ExplainedPlan
from specchat.records.generation import Activity, DraftTree, Guesses, Step
from specchat.records.plan import LedgerItem, Placement, Plan, Workload
from specchat.records.usage import MemoryReport

EOS = 256
PLAN = Plan(
    target="demo",
    draft="demo draft",
    quant="none",
    work=Workload("cpu", "fp32", ctx=400, tree_budget=64, draft_rows=128, chunk_rows=256),
    placement=Placement(num_layers=4, resident=(0, 2), slots=2),
    ledger=(LedgerItem("resident layers", 100 << 20), LedgerItem("KV cache", 50 << 20)),
    vram_bytes=12 << 30,
    host_bytes=0,
    streamed_bytes_per_step=60 << 20,
)
MEMORY = MemoryReport(12 << 30, 140 << 20, 150 << 20, 140 << 20, 7, 2, 2, 60 << 20)

CHOSEN = ExplainedPlan(
    PLAN,
    Prediction(2.0, 1.9, 0.5, 0.1, 12.0, 64, 6.0, "link", "measured"),
    (
        Choice("quant", "none", "original weights fit the device", pinned=False, alternative=Alternative("int8", 9.0)),
        Choice("ctx", "512", "asked for", pinned=True),
    ),
)


class ByteTokenizer:
    """One token for each byte, EOS, and a template of one line for each message."""

    def __init__(self, has_chat_template=True):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {character: i for i, character in enumerate(alphabet)}
        self.backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens(["<eos>"])
        self.has_chat_template = has_chat_template
        self.eos_token_id = EOS

    thinking_switch = "thinking"
    other_templates = ()

    def render(self, messages, *, ending="answer", thinking=None):
        text = "".join(f"[{m.role}]{m.content}\n" for m in messages)
        if ending == "continue":
            return text[:-1]
        if ending == "none":
            return text
        return f"{text}[assistant]<think>" if thinking else f"{text}[assistant]"

    def response_parser(self, prompt):
        return None

    def encode(self, text, *, add_special_tokens=False):
        return [EOS] * add_special_tokens + self.backend.encode(text).ids

    def decode(self, token_ids, *, skip_special_tokens=True):
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


TOKENIZER = ByteTokenizer()


@dataclass
class FakeEngine:
    """Answers with `answers`, in order, some tokens a step; counts like the real one."""

    answers: list
    tokens_per_step: int = 3
    cancel_after: int | None = None
    plan: Plan = PLAN
    load_s: float = 1.5
    prompts: list = field(default_factory=list)
    committed: list = field(default_factory=list)
    restore_points: list = field(default_factory=list)
    closed: int = 0
    pause: Callable[[], None] = lambda: None

    def generate(self, prompt_ids, sampling, *, stop_ids, max_tokens=None, cancel=None, restore_at=()):
        if len(prompt_ids) >= self.plan.work.ctx:
            raise PromptTooLongError("too long")
        self.prompts.append(list(prompt_ids))
        self.restore_points.append([TOKENIZER.decode(prompt_ids[:length]) for length in restore_at])
        answer = self.answers.pop(0)
        ids = (TOKENIZER.encode(answer) if isinstance(answer, str) else list(answer))[:max_tokens]
        cached = self._common(prompt_ids)
        self.committed = list(prompt_ids)
        try:
            self.pause()
            for number, start in enumerate(range(0, len(ids), self.tokens_per_step)):
                if cancel is not None and number == self.cancel_after:
                    cancel.set()
                if cancel is not None and cancel.is_set():
                    yield self._step((), "interrupt", 0, len(self.committed))
                    return
                tokens = tuple(ids[start : start + self.tokens_per_step])
                reason = None
                if start + self.tokens_per_step >= len(ids):
                    reason = "stop" if tokens[-1] in stop_ids else "length"
                new = len(prompt_ids) - cached if number == 0 else 1
                self.committed += tokens
                yield self._step(tokens, reason, new, cached)
                self.pause()
        finally:
            self.closed += 1

    def truncate(self, length):
        del self.committed[length:]

    def forget(self):
        self.truncate(0)

    def relieve(self):
        pass

    def memory(self):
        return MEMORY

    @property
    def activity(self):
        return Activity("verifying", 2, 4)

    def close(self):
        pass

    def _common(self, ids):
        pairs = zip(self.committed, ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.committed), len(ids)))

    def _step(self, tokens, reason, new, cached):
        accepted = max(len(tokens) - 1, 0)
        guesses = (Guesses("model", 60, accepted), Guesses("other", 4, 0))
        tree = tree_of(tokens) if tokens else None
        return Step(tokens, reason, new, cached, 64, accepted, 5, 0.5, 0.1, 0.3, 0.1, 0.05, 60 << 20, guesses, tree)


def tree_of(tokens):
    """A tree in which all tokens but the last were guessed, each beside one that is wrong."""
    *path, _ = tokens
    guesses = [guess for token in path for guess in (token, token + 1)]
    parents = [-1 if i < 2 else i // 2 * 2 - 2 for i in range(len(guesses))]
    return DraftTree(tuple(guesses), tuple(parents), tuple(range(0, len(guesses), 2)))
