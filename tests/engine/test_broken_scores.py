"""Models that compute NaN or infinity: a target stops with an error, a draft is given up and the text stays the same.

Real checkpoints with real damage: weights that are NaN, infinite, or too large for fp16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import make_plan, random_prompt, write
from support.loading import load_engine
from support.plans import changed
from support.tiny_models import VOCAB, make_config, perturbed, random_model, save
from torch import Tensor

from specchat.cli.exit_status import code_of
from specchat.engine.engine import Engine
from specchat.engine.sampling import Sampler, ScoresNotFiniteError
from specchat.errors import BrokenScoresError
from specchat.records.generation import Sampling, Step
from specchat.records.model import ModelSource

GREEDY = Sampling()
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=4),
]
PROMPT = random_prompt(10, VOCAB)
NUM_TOKENS = 24
NEVER = 5  # a token id that no text below has

Damage = Callable[[dict[str, Tensor]], None]


def fill(name: str, value: float) -> Damage:
    return lambda tensors: tensors[name].fill_(value)


def scale(name: str, factor: float) -> Damage:
    return lambda tensors: tensors[name].mul_(factor)


def fill_token(value: float, token_id: int = NEVER) -> Damage:
    """Damage the embedding of one token: only texts with this token are spoilt."""
    return lambda tensors: tensors["model.embed_tokens.weight"][token_id].fill_(value)


DAMAGES = {
    "nan head": fill("lm_head.weight", float("nan")),
    "nan layer": fill("model.layers.2.mlp.down_proj.weight", float("nan")),
    "infinite layer": fill("model.layers.1.mlp.up_proj.weight", float("inf")),
    "one nan": lambda tensors: tensors["model.norm.weight"][3:4].fill_(float("nan")),
}


@dataclass
class Models:
    folder: Path
    target: ModelSource
    draft: ModelSource

    def damaged(self, source: ModelSource, damage: Damage, name: str) -> ModelSource:
        copy = self.folder / f"{source.name.rpartition('/')[2]}-{name}".replace(" ", "-")
        copy.mkdir(exist_ok=True)
        for file in source.path.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        tensors = load_file(copy / "model.safetensors")
        damage(tensors)
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return ModelSource(name=str(copy), path=copy)

    def load(self, target: ModelSource, draft: ModelSource | None, dtype: str = "fp32", resident=None) -> Engine:
        plan = changed(make_plan(target, draft, num_layers=4, resident=resident), dtype=dtype)
        return load_engine(plan, target, draft)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("broken")
    model = random_model(make_config("llama"))
    return Models(folder, save(model, folder / "target"), save(perturbed(model, 0.03), folder / "draft"))


@pytest.fixture(scope="module")
def plain(models: Models) -> list[list[int]]:
    """What the target writes without a draft, per sampling."""
    with models.load(models.target, None) as engine:
        return [write(engine, PROMPT, sampling, NUM_TOKENS)[0] for sampling in SAMPLINGS]


# --- the target ------------------------------------------------------------------------------------------------------


def error_of(engine: Engine, sampling: Sampling = GREEDY) -> BrokenScoresError:
    with pytest.raises(BrokenScoresError) as caught:
        write(engine, PROMPT, sampling, NUM_TOKENS)
    assert code_of(caught.value) == 1
    assert caught.value.hint is not None and "\n" not in caught.value.message + caught.value.hint
    return caught.value


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("resident", [None, ()], ids=["resident", "streamed"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_target_stops_with_an_error(models: Models, name: str, resident, drafts: bool):
    target = models.damaged(models.target, DAMAGES[name], name)
    with models.load(target, models.draft if drafts else None, resident=resident) as engine:
        for sampling in SAMPLINGS:
            error = error_of(engine, sampling)
            assert target.name in error.message and "fp32" in error.message and "damaged" in error.hint
        assert engine.draft_lost is None  # the draft is not to blame


def test_overflow_in_fp16_names_the_dtype_and_fp32_works(models: Models):
    target = models.damaged(models.target, scale("model.embed_tokens.weight", 3e6), "overflow")
    with models.load(target, None, "fp16") as engine:
        error = error_of(engine)
    assert "fp16" in error.message and error.hint == "use --dtype bf16 or --dtype fp32"
    for dtype in ("bf16", "fp32"):
        with models.load(target, None, dtype) as engine:
            assert len(write(engine, PROMPT, GREEDY, NUM_TOKENS)[0]) == NUM_TOKENS


def test_the_error_comes_when_the_text_breaks_and_the_engine_goes_on(models: Models, plain: list[list[int]]):
    spoilt = next(index for index in range(4, NUM_TOKENS) if plain[0][index] not in [*PROMPT, *plain[0][:index]])
    target = models.damaged(models.target, fill_token(float("nan"), plain[0][spoilt]), "late")
    for draft in (None, models.draft):
        with models.load(target, draft) as engine:
            taken: list[int] = []
            with pytest.raises(BrokenScoresError):
                for step in engine.generate(PROMPT, GREEDY, stop_ids=frozenset(), max_tokens=NUM_TOKENS):
                    taken += step.token_ids
            assert taken == plain[0][: spoilt + 1]
            other = random_prompt(6, VOCAB, 5)
            with models.load(models.target, None) as sound:
                expected = write(sound, other, GREEDY, 8)[0]
            assert plain[0][spoilt] not in [*other, *expected[:-1]]
            assert write(engine, other, GREEDY, 8)[0] == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_branch_does_not_spoil_the_text(models: Models, plain: list[list[int]], value: float):
    """Trees hold many tokens that the text never has; here each of those breaks the target's pass."""
    target = models.damaged(models.target, lambda tensors: fill_all_but(tensors, value, plain[0]), f"branch {value}")
    with models.load(target, models.draft) as engine:
        text, steps = write(engine, PROMPT, GREEDY, NUM_TOKENS)
    assert text == plain[0]
    assert any(step.tree_nodes == 0 for step in steps)  # repeated without a tree


def fill_all_but(tensors: dict[str, Tensor], value: float, text: list[int]) -> None:
    kept = {*PROMPT, *text}
    for token_id in range(VOCAB):
        if token_id not in kept:
            tensors["model.embed_tokens.weight"][token_id] = value


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_only_scores_without_a_best_one_are_refused(sampling: Sampling):
    inf, nan = float("inf"), float("nan")
    sampler = Sampler(sampling, 4, torch.device("cpu"))
    for scores in ([nan, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, nan], [-inf] * 4, [0.0, inf, 1.0, 1.0]):
        with pytest.raises(ScoresNotFiniteError):
            sampler.draw(torch.tensor(scores), [1, 2])
    assert sampler.draw(torch.tensor([-inf, -inf, 1.0, -inf]), [1, 2]) == 2


# --- the draft -------------------------------------------------------------------------------------------------------


def check_lost_once(steps: list[Step], draft: ModelSource) -> int:
    """Return the index of the only step that tells of the loss."""
    (index,) = [index for index, step in enumerate(steps) if step.warning is not None]
    assert draft.name in steps[index].warning and "fp32" in steps[index].warning
    assert "\n" not in steps[index].warning
    assert all(step.tree_nodes == 0 for step in steps[index:])
    return index


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_draft_is_given_up_for_good(models: Models, plain: list[list[int]], name: str):
    draft = models.damaged(models.draft, DAMAGES[name], name)
    with models.load(models.target, draft) as engine:
        assert engine.draft_lost is None
        texts, steps = zip(*(write(engine, PROMPT, sampling, NUM_TOKENS) for sampling in SAMPLINGS), strict=True)
        assert list(texts) == plain
        assert check_lost_once([step for answer in steps for step in answer], draft) == 0
        engine.forget()
        again, later = write(engine, PROMPT, GREEDY, NUM_TOKENS)
        assert again == plain[0] and all(step.warning is None and not step.tree_nodes for step in later)


@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_a_draft_that_breaks_later_is_given_up_there(models: Models, plain: list[list[int]], number: int):
    text = plain[number]
    spoilt = next(index for index in range(10, NUM_TOKENS) if text[index] not in [*PROMPT, *text[:index]])
    draft = models.damaged(models.draft, fill_token(float("nan"), text[spoilt]), f"late {number}")
    with models.load(models.target, draft) as engine:
        written, steps = write(engine, PROMPT, SAMPLINGS[number], NUM_TOKENS)
    assert written == text
    index = check_lost_once(steps, draft)
    assert any(step.tree_nodes for step in steps[:index])


def test_a_draft_that_overflows_in_bf16_leaves_the_target_alone(models: Models):
    draft = models.damaged(models.draft, scale("model.layers.1.mlp.up_proj.weight", 3e38), "overflow")
    texts = []
    for each in (None, draft):
        with models.load(models.target, each, "bf16") as engine:
            texts.append(write(engine, PROMPT, GREEDY, NUM_TOKENS)[0])
            assert (engine.draft_lost is None) == (each is None)
    assert texts[0] == texts[1]
