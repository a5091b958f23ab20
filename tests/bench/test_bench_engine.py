"""The engine functions that the bench uses, and the offloading baseline."""

import pytest
from support.engines import NOTHING, make_plan, write
from support.loading import load_engine
from support.tiny_models import make_config, perturbed, random_model, save

from specchat.bench.baselines import OffloadedModel, _generation_config
from specchat.engine.measuring import drop_prefetched, margin_after, measure_pass, without_draft
from specchat.models.checkpoint.safetensors import INDEX_FILE, SINGLE_FILE
from specchat.records.generation import Sampling

PROMPT = list(range(3, 23))
NUM_TOKENS = 12
LAYERS = make_config("llama").num_hidden_layers


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target = random_model(make_config("llama"))
    return save(target, folder / "target"), save(perturbed(target, 0.03), folder / "draft")


@pytest.fixture
def engine(sources):
    plan = make_plan(*sources, num_layers=LAYERS, resident=(1,))
    with load_engine(plan, *sources) as engine:
        yield engine


def test_without_draft_gives_same_text_at_one_token_per_pass(engine):
    drafted, steps = write(engine, PROMPT, Sampling(temperature=0.7), NUM_TOKENS)
    engine.forget()
    with without_draft(engine):
        plain, plain_steps = write(engine, PROMPT, Sampling(temperature=0.7), NUM_TOKENS)
    assert plain == drafted
    assert len(plain_steps) == NUM_TOKENS > len(steps)
    engine.forget()
    assert len(write(engine, PROMPT, Sampling(temperature=0.7), NUM_TOKENS)[1]) == len(steps)  # the draft is back


def test_forget_empties_both_caches(engine):
    write(engine, PROMPT, Sampling(), NUM_TOKENS)
    engine.forget()
    (draft,) = engine._drafter.models
    assert engine.target.cache.lengths == draft.cache.lengths == [0]
    _, steps = write(engine, PROMPT, Sampling(), NUM_TOKENS)
    assert (steps[0].cached_rows, steps[0].new_rows) == (0, len(PROMPT))


@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_single_pass_streams_as_much_as_a_step(engine, num_rows):
    timed = measure_pass(engine, num_rows)
    assert 0 <= timed.wait_s <= timed.pass_s
    _, steps = write(engine, PROMPT, Sampling(), 3)
    assert timed.streamed_bytes == steps[-1].streamed_bytes > 0
    assert steps[0].cached_rows == 0  # the single pass left the caches empty


def test_dropping_prefetched_layers_keeps_the_text(engine):
    expected, _ = write(engine, PROMPT, Sampling(), NUM_TOKENS)
    engine.forget()
    tokens = []
    for step in engine.generate(PROMPT, Sampling(), stop_ids=NOTHING, max_tokens=NUM_TOKENS):
        tokens += step.token_ids
        drop_prefetched(engine)
    assert tokens == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_margin_is_positive_and_repeatable(engine, temperature):
    sampling = Sampling(temperature=temperature)
    found = margin_after(engine, PROMPT, sampling)
    assert found.margin > 0
    assert found.scale > found.margin or temperature
    assert margin_after(engine, PROMPT, sampling).margin == pytest.approx(found.margin, rel=1e-4)


def test_offloaded_generation_gives_the_targets_text(engine, sources):
    target, draft = sources
    greedy, _ = write(engine, PROMPT, Sampling(), NUM_TOKENS)
    paused = []
    for helper in (None, draft):
        with OffloadedModel(target, dtype="fp32", device="cpu", resident=(1,), draft=helper) as model:
            out = model.generate(
                PROMPT,
                Sampling(),
                stop_ids=NOTHING,
                max_tokens=NUM_TOKENS,
                before_pass=lambda: paused.append(1),
            )
            assert list(out.token_ids) == greedy
            assert sum(out.pass_tokens) == NUM_TOKENS
            assert list(out.pass_ends_s) == sorted(out.pass_ends_s)
            assert len(paused) >= len(out.pass_tokens)
            assert model.measure_pass(16) > 0
            stopped = model.generate(
                PROMPT, Sampling(), stop_ids=NOTHING, max_tokens=NUM_TOKENS, should_stop=lambda: True
            )
            assert len(stopped.pass_tokens) == 1
    assert len(out.pass_tokens) < NUM_TOKENS  # the draft helped


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_models_without_fused_attention_are_offloaded_with_their_own(architecture, tmp_path):
    source = save(random_model(make_config(architecture)), tmp_path / "m")
    with OffloadedModel(source, dtype="fp32", device="cpu", resident=(0,), draft=source) as model:
        assert len(model.generate(PROMPT, Sampling(), stop_ids=NOTHING, max_tokens=4).token_ids) == 4


def test_offloaded_generation_stops_at_a_stop_token(sources):
    with OffloadedModel(sources[0], dtype="fp32", device="cpu", resident=(), draft=None) as model:
        first = model.generate(PROMPT, Sampling(), stop_ids=NOTHING, max_tokens=1).token_ids[0]
        out = model.generate(PROMPT, Sampling(), stop_ids=frozenset({first}), max_tokens=NUM_TOKENS)
        assert out.token_ids == (first,)


def test_transformers_samples_from_the_whole_vocabulary():
    config = _generation_config(Sampling(temperature=0.7), NOTHING, 4)
    assert (config.top_k, config.top_p, config.min_p) == (0, 1.0, None)  # by default it keeps 50 tokens


def test_checkpoints_without_an_index_are_read_through_links(sources, tmp_path):
    target, _ = sources
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in target.path.iterdir():
        name = "layer-00000.safetensors" if file.name == SINGLE_FILE else file.name
        (odd / name).write_bytes(file.read_bytes())
    before = sorted(file.name for file in odd.iterdir())
    source = type(target)("odd", odd)
    with (
        OffloadedModel(target, dtype="fp32", device="cpu", resident=(0,), draft=None) as plain,
        OffloadedModel(source, dtype="fp32", device="cpu", resident=(0,), draft=None) as linked,
    ):
        texts = [m.generate(PROMPT, Sampling(), stop_ids=NOTHING, max_tokens=4).token_ids for m in (plain, linked)]
    assert texts[0] == texts[1]
    assert sorted(file.name for file in odd.iterdir()) == before
    assert INDEX_FILE not in before
