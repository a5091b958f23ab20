"""The keyed race: noise against a slow pure-Python version, draws against exact probabilities.

The slow version is SplitMix64 as published, one value at a time, and the processors on plain lists of floats. Seeds are
fixed, so the statistical tests are deterministic.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.engines import make_plan, write
from support.loading import load_model
from support.tiny_models import perturbed, random_model, save

from specchat.engine.drafting.drafter import Drafter, ModelDrafter, NoDrafter
from specchat.engine.engine import Engine
from specchat.engine.model import TreeModel
from specchat.engine.sampling import Noise, Sampler
from specchat.models.hf.processors import logits_processors
from specchat.records.generation import Sampling
from specchat.records.model import ModelSource

CPU = torch.device("cpu")
MASK64 = (1 << 64) - 1

# --- the noise -------------------------------------------------------------------------------------------------------


def splitmix64(seed: int, index: int) -> int:
    """Return the index-th output (from 1) of the generator of Steele, Lea and Flood, started at `seed`."""
    z = (seed + index * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def slow_noise(seed: int, position: int, token: int) -> float:
    """Return -log e: the seed starts a generator of positions, and each of its outputs starts a generator of tokens."""
    seed_key = splitmix64(seed - 0x9E3779B97F4A7C15, 1)
    position_key = splitmix64(seed_key, position + 1)
    bits = splitmix64(position_key, token + 1) >> 12
    u = (bits + 0.5) * 2.0**-52
    return -math.log(-math.log1p(-u))


def test_slow_generator_gives_published_values():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, i) for i in range(1, 5)] == published


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 10**6), vocab=st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_noise_equals_the_slow_version(seed: int, position: int, vocab: int):
    row = Noise(seed, vocab, CPU).row(position)
    assert row.shape == (vocab,) and row.dtype == torch.float32
    slow = [slow_noise(seed, position, token) for token in range(vocab)]
    assert torch.allclose(row.double(), torch.tensor(slow, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@given(
    positions=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    max_rows=st.integers(1, 5),
    seed=st.integers(0, 2**64),
)
@settings(deadline=None, max_examples=40)
def test_noise_depends_on_neither_order_nor_eviction(positions: list[int], max_rows: int, seed: int):
    noise = Noise(seed, 13, CPU, max_rows=max_rows)
    for position in positions:
        assert torch.equal(noise.row(position), Noise(seed, 13, CPU).row(position))
    assert len(noise._rows) <= max_rows


def test_noise_of_a_token_does_not_depend_on_the_vocabulary():
    assert torch.equal(Noise(3, 50, CPU).row(7)[:20], Noise(3, 20, CPU).row(7))


def test_noise_is_exponential():
    for seed in (0, 1, 12345678901234567890):
        noise = Noise(seed, 1000, CPU)
        exponentials = torch.stack([noise.row(p) for p in range(100)]).double().neg().exp().flatten()
        assert torch.isfinite(exponentials).all() and (exponentials > 0).all()
        assert stats.kstest(exponentials.numpy(), "expon").pvalue > 1e-3


def test_noise_is_uncorrelated_between_neighbours():
    cube = torch.stack([torch.stack([Noise(s, 60, CPU).row(p) for p in range(40)]) for s in range(20)]).double()
    for axis in range(3):  # seeds, positions, tokens
        before, after = cube.narrow(axis, 0, cube.shape[axis] - 1), cube.narrow(axis, 1, cube.shape[axis] - 1)
        r = np.corrcoef(before.flatten(), after.flatten())[0, 1]
        assert abs(r) < 4 / math.sqrt(before.numel())


@pytest.mark.parametrize("bits", [0, -1])
def test_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch, bits: int):
    """All bits are 0, or all are 1, which random tests would never meet."""
    monkeypatch.setattr("specchat.engine.sampling._mix_tensor", lambda x: torch.full_like(x, bits))
    assert torch.isfinite(Noise(0, 4, CPU).row(0)).all()


# --- exact probabilities, slowly -------------------------------------------------------------------------------------


def exact_probabilities(logits: Sequence[float], context: Sequence[int], sampling: Sampling) -> list[float]:
    """Return the distribution after penalty, temperature, top-k, top-p and min-p, in plain Python."""
    scores = list(logits)
    for token in set(context):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores = [score / sampling.temperature for score in scores]
    kept = sorted(range(len(scores)), key=lambda i: -scores[i])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    p = _softmax(scores, kept)
    if sampling.top_p < 1:
        mass_before = [sum(p[i] for i in kept[:n]) for n in range(len(kept))]
        kept = [i for i, mass in zip(kept, mass_before, strict=True) if mass < sampling.top_p]
        p = _softmax(scores, kept)
    if sampling.min_p:
        kept = [i for i in kept if p[i] >= sampling.min_p * max(p)]
        p = _softmax(scores, kept)
    return p


def _softmax(scores: Sequence[float], kept: Sequence[int]) -> list[float]:
    best = max(scores[i] for i in kept)
    total = sum(math.exp(scores[i] - best) for i in kept)
    return [math.exp(score - best) / total if i in set(kept) else 0.0 for i, score in enumerate(scores)]


def check_fit(counts: Mapping[object, int], exact: Mapping[object, float]) -> None:
    """Check chi-square (rare outcomes pooled) and total variation; impossible outcomes must not occur."""
    trials = sum(counts.values())
    impossible = [outcome for outcome in counts if exact.get(outcome, 0.0) == 0.0]
    assert not impossible, f"{impossible} cannot be drawn"
    assert math.isclose(sum(exact.values()), 1.0, rel_tol=1e-6)
    common = [outcome for outcome, p in exact.items() if p * trials >= 5]
    observed = [counts.get(outcome, 0) for outcome in common]
    expected = [exact[outcome] * trials for outcome in common]
    if trials - sum(expected) > 1e-6 * trials:
        observed.append(trials - sum(observed))
        expected.append(trials - sum(expected))
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    distance = sum(abs(counts.get(outcome, 0) / trials - p) for outcome, p in exact.items()) / 2
    by_chance = sum(math.sqrt(2 * p * (1 - p) / (math.pi * trials)) for p in exact.values()) / 2  # its expected value
    assert distance < 2 * by_chance


def test_check_fit_fails_on_a_small_bias():
    """A distribution that is off by a few percent does not pass."""
    rng = np.random.default_rng(0)
    exact = {0: 0.5, 1: 0.3, 2: 0.2}
    check_fit(Counter(rng.choice(3, 4000, p=[0.5, 0.3, 0.2]).tolist()), exact)
    with pytest.raises(AssertionError):
        check_fit(Counter(rng.choice(3, 4000, p=[0.54, 0.28, 0.18]).tolist()), exact)


# --- one draw --------------------------------------------------------------------------------------------------------

PROCESSORS = {
    "none": Sampling(temperature=1.0),
    "temperature": Sampling(temperature=0.6),
    "hot": Sampling(temperature=1.7),
    "top-k": Sampling(temperature=1.0, top_k=4),
    "top-p": Sampling(temperature=1.0, top_p=0.8),
    "min-p": Sampling(temperature=1.0, min_p=0.15),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.8),
    "all": Sampling(temperature=1.4, top_k=6, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
}


@pytest.mark.parametrize(("name", "vocab"), list(zip(PROCESSORS, itertools.cycle([7, 11]), strict=False)))
def test_a_draw_has_the_exact_distribution(name: str, vocab: int):
    sampling = PROCESSORS[name]
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    sentence = [1, 4, 4, 2]  # what is penalised, however long the context
    counts: Counter[int] = Counter()
    for seed in range(12):
        sampler = Sampler(Sampling(**{**vars(sampling), "seed": seed}), vocab, CPU)
        counts.update(sampler.draw(logits, sentence + [1] * more) for more in range(220))
    exact = exact_probabilities(logits.double().tolist(), sentence, sampling)
    assert sum(p > 0 for p in exact) >= 3
    check_fit(counts, dict(enumerate(exact)))


def test_greedy_takes_the_highest_score_after_the_penalty():
    logits = torch.tensor([0.5, 2.0, 1.9, -1.0])
    assert Sampler(Sampling(), 4, CPU).draw(logits, [1]) == 1
    assert Sampler(Sampling(repetition_penalty=1.2), 4, CPU).draw(logits, [1]) == 2
    assert Sampler(Sampling(repetition_penalty=1.2), 4, CPU).draw(logits, [1, 2, 3]) == 1
    # an early token is penalised as much as a late one
    assert Sampler(Sampling(repetition_penalty=1.2), 4, CPU).draw(logits, [1, 3, 3, 3]) == 2


# --- through the engine, deeper in the tree --------------------------------------------------------------------------

VOCAB = 8
PROMPT = [5, 3, 6, 4, 7]
NUM_SEEDS = 300
NUM_DRAWN = 3
SAMPLINGS = {"plain": Sampling(temperature=1.0), "combined": Sampling(temperature=0.9, top_k=6, top_p=0.95, min_p=0.05)}
Texts = list[tuple[int, ...]]


@dataclass
class SmallVocabulary:
    model: hf.LlamaForCausalLM
    target: ModelSource
    draft: ModelSource


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallVocabulary:
    folder = tmp_path_factory.mktemp("small-vocabulary")
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = random_model(config, seed=4)
    return SmallVocabulary(model, save(model, folder / "target"), save(perturbed(model, 0.2), folder / "draft"))


def load(source: ModelSource) -> TreeModel:
    return load_model(
        source, dtype=torch.float32, device=CPU, resident=None, num_slots=0, cache_rows=64, chunk_rows=512
    )


def texts_of(small: SmallVocabulary, drafter: Drafter, sampling: Sampling) -> tuple[Texts, int]:
    """Return an answer of `NUM_DRAWN` tokens per seed, and the number of answers with a node accepted at depth 2."""
    guesses = None if isinstance(drafter, NoDrafter) else small.draft
    plan = make_plan(small.target, guesses, num_layers=1, ctx=32, tree_budget=8)
    texts, num_deep = [], 0
    with Engine(plan, load(small.target), drafter) as engine:
        for seed in range(NUM_SEEDS):
            tokens, steps = write(engine, PROMPT, Sampling(**{**vars(sampling), "seed": seed}), NUM_DRAWN)
            texts.append(tuple(tokens))
            num_deep += steps[0].accepted >= 2
    return texts, num_deep


@torch.inference_mode()
def joint_probabilities(small: SmallVocabulary, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Return the probability of every text of `NUM_DRAWN` tokens, by one transformers forward pass per prefix."""
    joint = {(): 1.0}
    for _ in range(NUM_DRAWN):
        batch = torch.tensor([[*PROMPT, *text] for text in joint])
        logits = small.model(batch).logits[:, -1].double().tolist()
        step = {
            text: exact_probabilities(row, [*PROMPT, *text], sampling) for text, row in zip(joint, logits, strict=True)
        }
        joint = {(*text, t): joint[text] * step[text][t] for text in joint for t in range(VOCAB)}
    return joint


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "combined" else pytest.mark.slow) for name in SAMPLINGS]
)
def test_answers_have_the_exact_joint_distribution(small: SmallVocabulary, name: str):
    sampling = SAMPLINGS[name]
    drafters: dict[str, Callable[[], Drafter]] = {
        "shared noise": lambda: ModelDrafter(load(small.draft), max_rows=16, max_context=64),
        "own guesses": lambda: ModelDrafter(load(small.draft), max_rows=16, max_context=64, shared_noise=False),
        "no draft": NoDrafter,
    }
    results = {kind: texts_of(small, make(), sampling) for kind, make in drafters.items()}
    texts = results["no draft"][0]
    for kind in ("shared noise", "own guesses"):
        assert results[kind][0] == texts, kind
    # both drafts are followed to depth 2 often enough that tokens drawn there count, and sharing the noise helps
    assert results["shared noise"][1] > 1.5 * results["own guesses"][1] > 0.05 * NUM_SEEDS
    exact = joint_probabilities(small, sampling)
    check_fit(Counter(texts), exact)
    for length in range(1, NUM_DRAWN):
        shorter: Counter[tuple[int, ...]] = Counter()
        for text, p in exact.items():
            shorter[text[:length]] += p  # type: ignore[assignment]
        check_fit(Counter(text[:length] for text in texts), shorter)


# --- the order of processors -----------------------------------------------------------------------------------------

ORDERS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(top_k=5, top_p=0.5, min_p=0.1),  # greedy: the rest is left out
    Sampling(temperature=1.0),
    Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    Sampling(temperature=0.7, top_k=20),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=0.7, min_p=0.05),
    Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
    Sampling(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=0.9),
]


def transformers_processors(model: hf.PreTrainedModel, sampling: Sampling, min_p: float | None) -> list[object]:
    config = hf.GenerationConfig(
        do_sample=not sampling.greedy,
        repetition_penalty=sampling.repetition_penalty,
        **{}
        if sampling.greedy
        else {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": min_p,
        },
    )
    return list(model._get_logits_processor(config, input_ids_seq_length=3))


def described(processors: Sequence[object]) -> list[tuple[str, dict[str, object]]]:
    return [(type(p).__name__, vars(p)) for p in processors]


@pytest.mark.parametrize("sampling", ORDERS, ids=str)
def test_processors_and_their_order_are_those_of_transformers(small: SmallVocabulary, sampling: Sampling):
    theirs = transformers_processors(small.model, sampling, sampling.min_p or None)
    assert described(logits_processors(sampling)) == described(theirs)


def test_min_p_0_adds_no_processor(small: SmallVocabulary):
    """transformers appends a warper for 0.0 that keeps every token, so omitting the warper changes nothing."""
    sampling = Sampling(temperature=0.7, min_p=0.0)
    theirs = transformers_processors(small.model, sampling, 0.0)
    assert described(logits_processors(sampling)) == described(theirs[:-1])
    scores = torch.tensor([[3.0, -40.0, 2.0, float("-inf")]])
    assert torch.equal(theirs[-1](torch.tensor([[0]]), scores), scores)


def test_processors_equal_the_slow_version():
    """All subsets of settings agree on random scores, ties aside."""
    generator = torch.Generator().manual_seed(9)
    choices = itertools.product((0.5, 1.0), (0, 3), (1.0, 0.7), (0.0, 0.2), (1.0, 1.5))
    for temperature, top_k, top_p, min_p, penalty in choices:
        sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
        scores = torch.randn(9, generator=generator) * 2
        context = [2, 5]
        processed = logits_processors(sampling)(torch.tensor([context]), scores[None])[0]
        exact = exact_probabilities(scores.double().tolist(), context, sampling)
        assert torch.allclose(processed.softmax(-1).double(), torch.tensor(exact).double(), atol=1e-5), sampling
