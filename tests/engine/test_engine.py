"""Edge cases of `generate` and `load`: ends of answers, limits and refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.engines import NOTHING, make_plan, random_prompt, write
from support.loading import load_engine, load_model
from support.tiny_models import REFUSED, VOCAB, make_config, perturbed, random_model, save

from specchat.engine.drafting.drafter import ModelDrafter
from specchat.engine.engine import Engine
from specchat.engine.kv_cache import Kept
from specchat.engine.tree import ROOT, TokenTree
from specchat.errors import (
    CorruptCheckpointError,
    PromptTooLongError,
    SpecchatError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from specchat.records.generation import Activity, Sampling, Step
from specchat.records.model import ModelSource

CTX = 64
BUDGET = 12
GREEDY = Sampling()
WARM = Sampling(temperature=0.8, seed=3)
PROMPT = random_prompt(10, VOCAB)


@dataclass
class Models:
    target: ModelSource
    perturbed: ModelSource
    poor: ModelSource

    def load(self, draft: ModelSource | None, budget: int = BUDGET) -> Engine:
        plan = make_plan(self.target, draft, num_layers=4, ctx=CTX, tree_budget=budget)
        return load_engine(plan, self.target, draft)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    model = random_model(make_config("llama"))
    drafts = [save(perturbed(model, relative), folder / f"draft-{relative}") for relative in (0.03, 0.3)]
    return Models(save(model, folder / "target"), *drafts)


@pytest.fixture(scope="module")
def engine(models: Models):
    with models.load(models.perturbed) as engine:
        yield engine


@pytest.fixture(scope="module")
def long_text(models: Models) -> list[int]:
    """Return the greedy answer to PROMPT, without a draft."""
    with models.load(None) as plain:
        text, steps = write(plain, PROMPT, GREEDY, 40)
    assert len(steps) == 40 and all(step.tree_nodes == step.accepted == step.depth == 0 for step in steps)
    return text


# --- ends of answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 17, 40])
def test_max_tokens(engine: Engine, long_text: list[int], max_tokens: int):
    tokens, steps = write(engine, PROMPT, GREEDY, max_tokens)
    assert tokens == long_text[:max_tokens]
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["length"]


def test_stop_tokens_end_the_answer_and_are_its_last(engine: Engine, long_text: list[int]):
    """The stop token is below the root, in the middle of an accepted path, or after the path."""
    places = set()
    for token in long_text[::2]:
        tokens, steps = write(engine, PROMPT, GREEDY, 40, frozenset({token, VOCAB + 5}))
        first = long_text.index(token)
        assert tokens == long_text[: first + 1]
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]
        places.add(min(steps[-1].accepted, 2))
    assert places == {0, 1, 2}


def test_several_stop_tokens(engine: Engine, long_text: list[int]):
    tokens, _ = write(engine, PROMPT, GREEDY, 40, frozenset(long_text[7:12]))
    assert tokens == long_text[: min(long_text.index(t) for t in long_text[7:12]) + 1]


def test_stop_token_at_the_length_limit_finishes_with_stop(engine: Engine, long_text: list[int]):
    index = next(i for i in range(5, 40) if long_text.index(long_text[i]) == i)
    tokens, steps = write(engine, PROMPT, GREEDY, index + 1, frozenset({long_text[index]}))
    assert len(tokens) == index + 1 and steps[-1].finish_reason == "stop"


@pytest.mark.parametrize("max_tokens", [None, 1000, CTX])
def test_a_full_context_ends_the_answer(engine: Engine, max_tokens: int | None):
    steps = list(engine.generate(PROMPT, GREEDY, stop_ids=NOTHING, max_tokens=max_tokens))
    assert sum(len(step.token_ids) for step in steps) == CTX - len(PROMPT)
    assert steps[-1].finish_reason == "context"


def test_max_tokens_that_fill_the_context_finish_with_length(engine: Engine):
    tokens, steps = write(engine, PROMPT, GREEDY, CTX - len(PROMPT))
    assert len(tokens) == CTX - len(PROMPT) and steps[-1].finish_reason == "length"


@pytest.mark.parametrize(("max_tokens", "reason"), [(None, "context"), (1, "length"), (2, "context")])
def test_longest_prompt(engine: Engine, max_tokens: int | None, reason: str):
    """A prompt of one token less than the context leaves room for one token."""
    prompt = random_prompt(CTX - 1, VOCAB, seed=4)
    (step,) = engine.generate(prompt, GREEDY, stop_ids=NOTHING, max_tokens=max_tokens)
    assert len(step.token_ids) == 1 and step.finish_reason == reason
    assert step.tree_nodes == 0  # nothing that could be accepted is guessed


@pytest.mark.parametrize("length", [CTX, CTX + 1, 3 * CTX])
def test_prompt_too_long(engine: Engine, length: int, long_text: list[int]):
    with pytest.raises(PromptTooLongError) as caught:
        next(iter(engine.generate(random_prompt(length, VOCAB), GREEDY, stop_ids=NOTHING)))
    assert str(length) in caught.value.message and str(CTX) in caught.value.message
    check_one_line(caught.value)
    assert write(engine, PROMPT, GREEDY, 10)[0] == long_text[:10]  # nothing is broken by it


def test_a_prompt_of_one_token(models: Models, engine: Engine):
    with models.load(None) as plain:
        assert write(engine, [7], WARM, 12)[0] == write(plain, [7], WARM, 12)[0]


# --- what steps say --------------------------------------------------------------------------------------------------


def check_guesses(step: Step) -> None:
    """Check that a step counts the nodes and the passes of its only source."""
    if not step.tree_nodes:
        assert step.guesses == ()
        return
    (guesses,) = step.guesses
    assert (guesses.source, guesses.offered, guesses.accepted) == ("model", step.tree_nodes, step.accepted)
    assert step.tree is not None
    depths = TokenTree(step.tree.tokens, step.tree.parents).depths
    assert guesses.offered_by_depth == tuple(depths.count(depth) for depth in range(1, step.depth + 1))
    assert guesses.accepted_by_depth == (1,) * step.accepted
    assert 0 < guesses.draft_s <= step.draft_s
    assert 1 <= guesses.draft_passes <= 1 + step.tree_nodes


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_step_counters_add_up(engine: Engine, sampling: Sampling):
    engine.truncate(0)
    tokens, steps = write(engine, PROMPT, sampling, 30)
    length = len(PROMPT)
    for step in steps:
        assert step.cached_rows + step.new_rows == length
        assert step.accepted == len(step.token_ids) - 1 <= step.depth <= step.tree_nodes <= BUDGET
        check_guesses(step)
        assert 0 <= step.draft_s + step.verify_s + step.sample_s <= step.pass_s
        assert step.streamed_bytes == 0 and step.stream_wait_s == 0
        length += len(step.token_ids)
    assert length == len(PROMPT) + len(tokens) == len(PROMPT) + 30
    assert len(steps) < 20  # the draft is often right
    assert all(step.depth < 30 for step in steps)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_steps_show_their_tree_and_the_path_taken(engine: Engine, sampling: Sampling):
    _, steps = write(engine, PROMPT, sampling, 30)
    assert any(step.accepted for step in steps)
    for step in steps:
        if step.tree is None:
            assert step.tree_nodes == 0
            continue
        assert len(step.tree.tokens) == len(step.tree.parents) == step.tree_nodes
        assert all(parent < node for node, parent in enumerate(step.tree.parents))
        assert tuple(step.tree.tokens[node] for node in step.tree.accepted) == step.token_ids[: step.accepted]
        assert [step.tree.parents[node] for node in step.tree.accepted] == [ROOT, *step.tree.accepted][: step.accepted]


def test_activity_can_be_read_during_a_step(engine: Engine):
    """Read the activity at every check for cancellation, which is before every layer."""
    seen: list[Activity] = []

    class Watch(threading.Event):
        def is_set(self) -> bool:
            seen.append(engine.activity)
            return False

    engine.truncate(0)
    assert engine.activity == Activity("idle", 0, 4)
    steps = list(engine.generate(PROMPT, GREEDY, stop_ids=NOTHING, max_tokens=12, cancel=Watch()))
    assert {activity.phase for activity in seen} == {"drafting", "prefill", "verifying"}
    assert [a.layers_done for a in seen if a.phase == "prefill"] == [0, 1, 2, 3]
    assert [a.layers_done for a in seen if a.phase == "verifying"] == [0, 1, 2, 3] * (len(steps) - 1)
    assert engine.activity == Activity("idle", 0, 4)


# --- an identical draft ----------------------------------------------------------------------------------------------


class WatchedDrafter(ModelDrafter):
    """Records the trees, and whether the accepted path reached their end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ended_at_leaf: list[bool] = []

    def grow(self, *args: Any) -> list[TokenTree]:
        (self.tree,) = super().grow(*args)
        return [self.tree]

    def commit(self, seat: int, path: Sequence[int], tokens: Sequence[int]) -> Sequence[Kept]:
        end = path[-1] if path else ROOT
        self.ended_at_leaf.append(end not in self.tree.parents)
        return super().commit(seat, path, tokens)


def watched(models: Models, draft: ModelSource, budget: int, branch: int) -> tuple[Engine, WatchedDrafter]:
    plan = make_plan(models.target, draft, num_layers=4, ctx=CTX, tree_budget=budget)
    load = {"dtype": torch.float32, "device": torch.device("cpu"), "resident": None, "num_slots": 0, "chunk_rows": 512}
    target, small = (load_model(source, cache_rows=CTX + 2 * budget, **load) for source in (models.target, draft))
    drafter = WatchedDrafter(small, max_rows=2 * budget, max_context=CTX, branch=branch)
    return Engine(plan, target, drafter), drafter


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("budget", [1, 5, 16])
def test_chains_of_an_identical_draft_are_accepted_to_their_end(models: Models, sampling: Sampling, budget: int):
    """With one child per node, the tree is the draft's own text with the same noise, so every node is accepted."""
    engine, drafter = watched(models, models.target, budget, branch=1)
    _, steps = write(engine, PROMPT, sampling, 40)
    assert [step.accepted for step in steps[:-1]] == [budget] * (len(steps) - 1)
    assert all(step.accepted == step.depth == step.tree_nodes for step in steps)
    assert len(steps) == -(-40 // (budget + 1))
    assert all(drafter.ended_at_leaf)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("budget", [1, 16, 100])
def test_an_identical_draft_is_never_contradicted(models: Models, sampling: Sampling, budget: int):
    """If a node has children, its best child is one of them, so the text leaves the tree only at a leaf."""
    engine, drafter = watched(models, models.target, budget, branch=16)
    _, steps = write(engine, PROMPT, sampling, 40)
    assert len(drafter.ended_at_leaf) == len(steps) <= {1: 20, 16: 16, 100: 10}[budget]
    assert all(drafter.ended_at_leaf)


def test_another_draft_is_contradicted(models: Models):
    """A different draft is rejected before a leaf, so the check above can fail."""
    engine, drafter = watched(models, models.poor, 16, branch=16)
    write(engine, PROMPT, WARM, 40)
    assert not all(drafter.ended_at_leaf)


# --- refusals --------------------------------------------------------------------------------------------------------


def check_one_line(error: SpecchatError) -> None:
    assert error.message and "\n" not in error.message
    assert error.hint is None or "\n" not in error.hint


def test_draft_with_another_vocabulary(models: Models, tmp_path: Path):
    draft = save(random_model(make_config("llama")), tmp_path / "stranger")
    path = draft.path / "tokenizer.json"
    words = json.loads(path.read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    path.write_text(json.dumps(words))
    with pytest.raises(VocabularyMismatchError, match="2 of 211") as caught:
        models.load(draft)
    check_one_line(caught.value)


def test_tokenizer_files_may_differ_in_form(models: Models, tmp_path: Path):
    """The vocabularies are equal, but the files differ."""
    draft = save(random_model(make_config("llama")), tmp_path / "same")
    path = draft.path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    models.load(draft).close()


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("size", [VOCAB - 60, VOCAB + 60])
def test_embeddings_of_another_length(models: Models, tmp_path: Path, size: int, sampling: Sampling):
    """Families pad vocabularies to different sizes; token ids of only one model are never accepted."""
    config = make_config("llama")
    config.vocab_size = size
    draft = save(random_model(config), tmp_path / "padded")
    with models.load(draft) as engine, models.load(None) as plain:
        text, steps = write(engine, PROMPT, sampling, 40)
        assert text == write(plain, PROMPT, sampling, 40)[0]
    assert max(text) >= size or size > VOCAB  # the draft has to read what it does not know
    assert all(step.tree_nodes for step in steps[:-1])


@pytest.mark.parametrize("architecture", REFUSED)
def test_refused_architectures(models: Models, tmp_path: Path, architecture: str):
    name, values = REFUSED[architecture]
    getattr(hf, name)(**values).save_pretrained(tmp_path / architecture)
    source = ModelSource(architecture, tmp_path / architecture)
    plan = make_plan(source, None, num_layers=2)
    with pytest.raises(UnsupportedModelError) as caught:
        load_engine(plan, source, None)
    check_one_line(caught.value)
    assert architecture in caught.value.message and "specchat cannot verify trees" in caught.value.message


# --- checkpoints that lack something ---------------------------------------------------------------------------------


def damaged(architecture: str, folder: Path, damage: Callable[[dict[str, torch.Tensor]], Any]) -> ModelSource:
    source = save(random_model(make_config(architecture)), folder / architecture)
    path = source.path / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return source


def check_refused(source: ModelSource, tensor: str, resident: tuple[int, ...] | None) -> None:
    plan = make_plan(source, None, num_layers=4, resident=resident)
    with pytest.raises(CorruptCheckpointError) as caught, load_engine(plan, source, None):
        raise AssertionError("found too late, or never")
    check_one_line(caught.value)
    assert tensor in caught.value.message


@pytest.mark.parametrize("resident", [None, ()], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    ("architecture", "tensor"),
    [
        ("llama", "model.layers.2.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.input_layernorm.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("mixtral", "model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_missing_tensor(tmp_path: Path, architecture: str, tensor: str, resident: tuple[int, ...] | None):
    source = damaged(architecture, tmp_path, lambda tensors: tensors.pop(tensor))
    check_refused(source, tensor, resident)


@pytest.mark.parametrize("resident", [None, ()], ids=["resident", "streamed"])
@pytest.mark.parametrize(
    "tensor",
    ["model.layers.3.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"],
)
def test_tensor_of_another_shape(tmp_path: Path, tensor: str, resident: tuple[int, ...] | None):
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor] = tensors[tensor][:-1].clone()

    check_refused(damaged("llama", tmp_path, cut), tensor, resident)


@pytest.mark.parametrize("resident", [None, ()], ids=["resident", "streamed"])
def test_missing_expert(tmp_path: Path, resident: tuple[int, ...] | None):
    """One of several tensors that are merged into one parameter is missing."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        (gone,) = (key for key in tensors if "layers.1." in key and "experts.2.w3" in key)
        del tensors[gone]

    check_refused(damaged("mixtral", tmp_path, drop), "layers.1.block_sparse_moe.experts.2.w3", resident)


@pytest.mark.parametrize("resident", [None, ()], ids=["resident", "streamed"])
def test_missing_experts(tmp_path: Path, resident: tuple[int, ...] | None):
    """All tensors of one merged parameter are missing; another merged parameter of the layer is complete."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.1." in key and key.endswith("w2.weight")]:
            del tensors[key]

    check_refused(damaged("mixtral", tmp_path, drop), "layers.1.block_sparse_moe.experts.0.w2", resident)
