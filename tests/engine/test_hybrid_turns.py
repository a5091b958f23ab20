"""Chats with hybrids: any sequence of turns, retries, edits and cancellations writes what a fresh run writes."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from support.engines import make_plan, random_prompt, write
from support.hybrids import OneByOne, random_hybrid
from support.loading import load_engine
from support.tiny_models import VOCAB, perturbed, save

from specchat.engine.engine import Engine
from specchat.engine.recurrent import restore
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

OPERATIONS = ("ask", "ask", "retry", "edit", "undo", "cut", "cancel", "strip")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    return Zoo(tmp_path_factory.mktemp("zoo"))


class Zoo:
    """Models with a draft of the same architecture, created on first use."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, OneByOne] = {}

    def slow(self, architecture: str) -> OneByOne:
        if architecture not in self._known:
            model = random_hybrid(architecture)
            save(model, self._root / architecture / "target")
            save(perturbed(model, 0.03), self._root / architecture / "draft")
            self._known[architecture] = OneByOne(model)
        return self._known[architecture]

    def engine(self, architecture: str, **settings: int) -> Engine:
        model = self.slow(architecture).model
        target, draft = (load(self._root / architecture / role) for role in ("target", "draft"))
        num_layers = model.config.num_hidden_layers
        plan = make_plan(target, draft, num_layers=num_layers, resident=range(0, num_layers, 2), ctx=400, **settings)
        return load_engine(plan, target, draft)


def load(folder: Path) -> ModelSource:
    return ModelSource(folder.name, folder)


class CancelAfter(threading.Event):
    """An event that is set once it was looked at a number of times: passes look before each layer."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def fuzz(zoo: Zoo, architecture: str, seed: int, num_texts: int, most_points: int = 12) -> int:
    """Run random operations, compare every text, and return how many rows were read again in vain."""
    rng, slow, num_reread = random.Random(seed), zoo.slow(architecture), 0
    with zoo.engine(
        architecture, tree_budget=20, chunk_rows=rng.choice([7, 16, 64]), most_points=most_points
    ) as engine:
        history = [random_prompt(rng.randrange(1, 60), VOCAB, seed)]
        for number in range(num_texts):
            new = random_prompt(rng.randrange(1, 30), VOCAB, 100 * seed + number)
            last = history[-1]
            operation = rng.choice(OPERATIONS)
            if len(last) > 250:
                history, last = history[:1], history[0]
            if operation in ("ask", "cancel", "cut"):
                prompt = last + new
            elif operation == "retry":
                prompt = last
            elif operation == "edit":
                prompt = last[: rng.randrange(1, len(last) + 1)] + new[:5]
            elif operation == "undo":
                history = history[:-1] or history
                prompt = history[-1] + new[:2]
            else:
                prompt = last[:-3] + new[:4]
            sampling = Sampling(temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(99))
            count = rng.randrange(1, 12)
            if operation == "cancel":
                stop = CancelAfter(rng.randrange(30))
                list(engine.generate(prompt, sampling, stop_ids=frozenset(), max_tokens=count, cancel=stop))
            expected = slow.generate(prompt, sampling, count)
            tokens, steps = write(engine, prompt, sampling, count)
            assert tokens == expected.tokens, (operation, number, min(expected.margins))
            num_reread += steps[0].new_rows
            if operation == "cut" and len(tokens) > 1:
                kept = rng.randrange(1, len(tokens))
                engine.truncate(len(prompt) + kept)
                tokens = tokens[:kept]
            history.append(prompt + tokens)
    return num_reread


@pytest.mark.parametrize(("architecture", "seed"), [("qwen3_5_text", 0), ("falcon_h1", 1)])
def test_any_chat_equals_a_fresh_run(zoo: Zoo, architecture: str, seed: int):
    fuzz(zoo, architecture, seed, num_texts=8)


@pytest.mark.parametrize("most_points", [0, 2])
def test_chats_with_few_restore_points_equal_fresh_runs(zoo: Zoo, most_points: int):
    fuzz(zoo, "qwen3_5_text", 3, num_texts=5, most_points=most_points)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(
    "architecture", ["qwen3_5_text", "falcon_h1", "kimi_linear", "granitemoehybrid", "lfm2", "zamba2"]
)
def test_many_chats_equal_fresh_runs(zoo: Zoo, architecture: str, seed: int):
    fuzz(zoo, architecture, seed, num_texts=20)


def interrupt(zoo: Zoo, architecture: str, num_cancelled: int) -> None:
    """Write texts whose passes are cancelled after any number of layers, of draft or target, and compare them."""
    rng, sampling = random.Random(5), Sampling(temperature=0.8, seed=4)
    with zoo.engine(architecture, tree_budget=12, chunk_rows=16) as engine:
        while num_cancelled > 0:
            prompt = random_prompt(40, VOCAB, rng.randrange(1000))
            expected, text = zoo.slow(architecture).generate(prompt, sampling, 24).tokens, list(prompt)
            while len(text) < len(prompt) + len(expected):
                left = len(prompt) + len(expected) - len(text)
                # Passes of deep models look more often; some passes must end, or the text never does.
                stop = CancelAfter(rng.randrange(1, rng.choice((40, 200))))
                for step in engine.generate(text, sampling, stop_ids=frozenset(), max_tokens=left, cancel=stop):
                    text += step.token_ids
                    num_cancelled -= step.finish_reason == "interrupt"
            assert text[len(prompt) :] == expected


def test_cancellations_at_any_layer_change_no_text(zoo: Zoo):
    interrupt(zoo, "qwen3_5_text", num_cancelled=10)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3_5_text", "falcon_h1", "jamba", "zamba2"])
def test_200_cancellations_at_any_layer_change_no_text(zoo: Zoo, architecture: str):
    interrupt(zoo, architecture, num_cancelled=200)


def turn(engine: Engine, prompt: list[int], num_tokens: int = 6, **kwargs: object) -> tuple[list[int], int]:
    """An answer, and the number of prompt rows that it read."""
    steps = list(engine.generate(prompt, Sampling(), stop_ids=frozenset(), max_tokens=num_tokens, **kwargs))
    return [token for step in steps for token in step.token_ids], steps[0].new_rows


def test_turns_read_only_what_is_new(zoo: Zoo):
    ask, more = random_prompt(50, VOCAB, 1), random_prompt(10, VOCAB, 2)
    with zoo.engine("qwen3_5_text", tree_budget=8) as engine:
        answer, rows = turn(engine, ask)
        assert rows == 50
        assert turn(engine, ask) == (answer, 1)  # a retry
        _, rows = turn(engine, ask + answer + more)
        assert rows <= 1 + len(more)  # the last token drawn has not been read yet
        _, rows = turn(engine, ask + answer + more[:3])
        assert rows <= 4
        assert turn(engine, ask) == (answer, 1)  # undone, and asked again


@pytest.mark.parametrize("most_points", [0, 2, 12])
def test_templates_that_strip_thinking_read_one_turn(zoo: Zoo, most_points: int):
    """Each answer is replaced by a shorter one in the next prompt, and the last tokens of the prompt are, too.

    The two points that are kept in any case suffice. Without points, every turn reads the whole chat again.
    """
    ending = random_prompt(3, VOCAB, 9)
    with zoo.engine("qwen3_5_text", tree_budget=8, most_points=most_points) as engine:
        history, read, lengths = [], [], []
        for number in range(8):
            history = history + random_prompt(12, VOCAB, number)
            answer, rows = turn(engine, history + ending, restore_at=[len(history)])
            read.append(rows)
            lengths.append(len(history) + len(ending))
            history = history + ending[:1] + answer[-2:]
        if most_points:
            assert max(read[1:]) <= 12 + 3 + len(ending)
        else:
            assert read == lengths
        recurrent = engine._target.cache.recurrent
        one_point = sum(state.shape.state_bytes(4) for state in recurrent.seats[0].states)
        assert recurrent.point_bytes <= most_points * one_point
        assert len(engine._drafter._scorer._held[0]) > 80


def test_a_long_prompt_can_be_cut_anywhere(zoo: Zoo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(restore, "NEAREST_ROWS", 16)
    prompt = random_prompt(300, VOCAB, 3)
    slow = zoo.slow("qwen3_5_text")
    for cut in (290, 250, 150, 20):
        with zoo.engine("qwen3_5_text", tree_budget=8, chunk_rows=64) as engine:
            turn(engine, prompt)
            changed = [*prompt[:cut], 5, 6, 7]
            answer, rows = turn(engine, changed)
            assert answer == slow.generate(changed, Sampling(), 6).tokens
            assert rows <= 3 + max(16, 2 * (300 - cut))
