"""MTP heads: scores equal transformers' own generator, and the cache follows what the target has committed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.engines import random_prompt
from support.heads import LAYOUTS, Follower, random_target, save_with_mtp
from support.loading import load_model
from support.quantized import Kind, awq, block_fp8, gptq, quantize_saved
from support.tiny_models import VOCAB

from specchat.engine.drafting.head_check import HeadCheck, HeadDisagreesError
from specchat.engine.model import PassCancelledError
from specchat.engine.sequence import FinalStates
from specchat.models.quant.modules import quant_linears
from specchat.records.model import ModelSource

CTX = 96
CPU = torch.device("cpu")
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSource]:
    root, made = tmp_path_factory.mktemp("mtp"), dict[str, ModelSource]()

    def source(architecture: str) -> ModelSource:
        if architecture not in made:
            model = random_target(architecture)
            made[architecture] = save_with_mtp(model, root / architecture, LAYOUTS[architecture])
        return made[architecture]

    return source


def test_embeddings_are_the_same_from_host_memory(sources: Callable[[str], ModelSource]):
    source, tokens = sources("qwen3"), random_prompt(20, VOCAB)
    plain, on_host = (load_model(source, cache_rows=CTX, chunk_rows=8, host_embeddings=each) for each in (False, True))
    assert torch.equal(plain.embed(tokens), on_host.embed(tokens))
    assert torch.equal(plain.append(tokens), on_host.append(tokens))  # a pass looks its own tokens up


# --- transformers as the oracle --------------------------------------------------------------------------------------


def their_head(source: ModelSource) -> tuple[Any, Any, Any]:
    """transformers' model, its MTP module and an empty cache."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(getattr(layers, "MtpModel", None), "forward_layer"):
        pytest.skip("this version of transformers has no MTP, or runs it in another way")
    from transformers.cache_utils import MtpCache

    model = hf.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    if getattr(model.config, "num_mtp_layers", None) is None:  # Qwen's layout is read, but not offered
        model.config.num_mtp_layers, model.config.mtp_layer_types = 1, ["full_attention"]
    else:  # transformers knows the layer by the number that it has in published models
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}.*"]
    return model, layers.MtpModel.from_pretrained(model).eval(), MtpCache(config=model.config.get_mtp_config())


@torch.no_grad()
def their_chain(source: ModelSource, text: list[int], chain: list[int]) -> torch.Tensor:
    """Scores after a text and after each token of a chain, by transformers' modules, [1 + n, V]."""
    model, mtp, cache = their_head(source)
    hidden = model.model(torch.tensor([text[:-1]])).last_hidden_state
    positions = torch.arange(1, len(text))[None]
    out = mtp.forward_layer(0, hidden, positions, cache, input_ids=torch.tensor([text[1:]]))[:, -1:]
    outs = [out]
    for place, token in enumerate(chain):
        position = torch.tensor([[len(text) + place]])
        out = mtp.forward_layer(0, out, position, cache, input_ids=torch.tensor([[token]]))
        outs.append(out)
    return model.lm_head(torch.cat(outs, 1)[0])


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe", "qwen3_5_text"])
def test_scores_equal_transformers(sources: Callable[[str], ModelSource], architecture: str):
    source = sources(architecture)
    text, chain = random_prompt(14, VOCAB), [5, 9, 7]
    theirs = their_chain(source, text, chain)
    follower = Follower(source, chunk_rows=8)
    follower.read(text[:-1], text[-1])
    check_close(follower.chain(text[-1], chain), theirs)
    assert theirs.std() > 0.1  # else anything is close


@pytest.mark.parametrize("architecture", ["deepseek_v3", "glm4_moe"])
def test_candidates_equal_transformers_generator(sources: Callable[[str], ModelSource], architecture: str):
    """Two steps of transformers' own loop: after the prompt, and after two accepted tokens."""
    source = sources(architecture)
    candidates = pytest.importorskip("transformers.generation.candidate_generator")
    model, _, _ = their_head(source)
    generator = candidates.MTPCandidateGenerator(model, hf.GenerationConfig(do_sample=False), {})
    follower, text = Follower(source), random_prompt(12, VOCAB)
    for num_read, num_matches in ((0, 0), (11, 1)):
        new = text[num_read:-1]
        with torch.no_grad():
            states = model.model(torch.tensor([text[:-1]])).last_hidden_state[:, num_read:]
        positions = {"position_ids": torch.arange(len(text))[None]}
        outputs = type("Outputs", (), {"hidden_states": [states]})()
        with torch.no_grad():
            _, theirs = generator.get_candidates(torch.tensor([text]), positions, outputs, False, num_matches)
        follower.read(new, text[-1])
        check_close(follower.chain(text[-1], [3, 4])[:1], theirs[0])
        text = [*text, 8, 21]


QUANTIZED = [
    ("qwen3", block_fp8((32, 32))),
    ("qwen3", gptq()),
    ("deepseek_v3", block_fp8((32, 32))),
    ("glm4_moe", awq()),
]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "kind"), QUANTIZED, ids=lambda each: getattr(each, "name", each))
def test_quantized_heads_score_like_the_matrices_that_they_mean(tmp_path: Path, architecture: str, kind: Kind):
    dense = save_with_mtp(random_target(architecture), tmp_path / "dense", LAYOUTS[architecture])
    pair = quantize_saved(dense, tmp_path, kind)
    text, chains = random_prompt(14, VOCAB), []
    for follower in map(Follower, (pair.quantized, pair.dense)):
        follower.read(text[:-1], text[-1])
        chains.append(follower.chain(text[-1], [5, 9]))
        names = {name.rpartition(".")[2] for name, _ in quant_linears(follower.model.skeleton.model)}
        assert ("eh_proj" in names) == (follower.source == pair.quantized)
    assert (chains[0] - chains[1]).abs().max() <= 2e-3 * float(chains[1].abs().max())


# --- the cache -------------------------------------------------------------------------------------------------------


def fresh_chain(source: ModelSource, text: list[int], chain: list[int]) -> torch.Tensor:
    follower = Follower(source)
    follower.read(text[:-1], text[-1])
    return follower.chain(text[-1], chain)


def test_rows_follow_the_committed_text(sources: Callable[[str], ModelSource]):
    """Trees, steps without drafts, another last token and a text that goes back leave the rows of a new head."""
    source, text = sources("qwen3"), random_prompt(40, VOCAB)
    follower, chain = Follower(source), [4, 6]
    follower.read(text[:10], text[10])
    assert follower.head.max_depth(follower.sequence(text[10])) > 0
    follower.chain(text[10], [9, 9, 9])  # dropped
    follower.read(text[10:13], 99)
    check_close(follower.chain(99, chain), fresh_chain(source, [*text[:13], 99], chain))
    follower.read([text[13]], text[14])  # instead of 99: the last row is computed anew
    for place in range(14, 20):
        follower.read([text[place]], text[place + 1])  # without drafts
    check_close(follower.chain(text[20], chain), fresh_chain(source, text[:21], chain))
    follower.target.cache.truncate(0, 8)
    follower.tokens = follower.tokens[:8]
    follower.read([*text[8:10], 7, 7], 5)
    other = [*text[:10], 7, 7]
    check_close(follower.chain(5, chain), fresh_chain(source, [*other, 5], chain))
    assert not torch.allclose(fresh_chain(source, [*other, 5], chain), fresh_chain(source, text[:13], chain))


def test_states_that_wait_are_bounded(sources: Callable[[str], ModelSource]):
    source, text = sources("qwen3"), random_prompt(90, VOCAB)
    follower = Follower(source)
    follower.read(text[:70], text[70])
    held = follower.head._held[0].states
    assert held is not None and len(held) == 70
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(PassCancelledError):
        follower.head.catch_up(cancel)
    assert held is follower.head._held[0].states  # nothing is lost
    follower.head.catch_up(None)  # no tree is grown
    follower.read([text[70]], text[71])
    held = follower.head._held[0].states
    assert held is not None and len(held) == 2
    check_close(follower.chain(text[71], [1]), fresh_chain(source, text[:72], [1]))


def test_few_states_do_not_keep_those_of_a_whole_pass(sources: Callable[[str], ModelSource]):
    follower, text = Follower(sources("qwen3")), random_prompt(5, VOCAB)
    hidden = torch.zeros(500, follower.target.append(text[:4]).shape[-1])
    follower.head.receive(0, FinalStates(text, 0, hidden[100:104]))
    held = follower.head._held[0].states
    assert held is not None and held.untyped_storage().nbytes() == held.nbytes


def test_a_head_that_missed_rows_goes_on_with_the_next_ones(sources: Callable[[str], ModelSource]):
    """After rows without states, the head reads the text from its next states on, as if the text began there."""
    source, text, chain = sources("qwen3"), random_prompt(30, VOCAB), [4, 6]
    follower = Follower(source)
    follower.read(text[:6], text[6])
    follower.chain(text[6], chain)
    follower.target.append(text[6:9])  # read while another drafter was in use
    follower.tokens = text[:9]
    for place in range(9, 15):
        follower.read([text[place]], text[place + 1])
        assert follower.head.max_depth(follower.sequence(text[place + 1])) > 0
        scores = follower.chain(text[place + 1], chain)
    check_close(scores, after_rows_without_states(source, text[:16], 9, chain))
    assert not torch.allclose(scores, fresh_chain(source, text[:16], chain))
    follower.target.cache.truncate(0, 4)  # back before the first of these states: all of them are known again
    follower.tokens = text[:4]
    follower.read(text[4:15], text[15])
    check_close(follower.chain(text[15], chain), after_rows_without_states(source, text[:16], 4, chain))


def after_rows_without_states(source: ModelSource, text: list[int], start: int, chain: list[int]) -> torch.Tensor:
    """Scores of a head that has states from `start` on."""
    follower = Follower(source)
    follower.target.append(text[:start])
    follower.tokens = text[:start]
    follower.read(text[start:-1], text[-1])
    return follower.chain(text[-1], chain)


def test_roots_and_texts_that_a_head_can_serve(sources: Callable[[str], ModelSource]):
    follower, text = Follower(sources("qwen3")), random_prompt(20, VOCAB)
    follower.read(text[:9], text[9])
    assert follower.head.max_depth(follower.sequence(text[9])) > 0
    assert follower.head.max_depth(follower.sequence(text[8])) > 0  # another root: its row is computed anew
    follower.tokens = [*text[:8], 3]
    assert follower.head.max_depth(follower.sequence(text[9])) == 0  # another text


def test_the_check_tells_a_head_from_chance(sources: Callable[[str], ModelSource]):
    """The states themselves as outputs agree with the target; those of other rows do not."""
    follower, text = Follower(sources("qwen3")), random_prompt(64, VOCAB)
    hidden = follower.target.append(text)
    for agrees, shift in ((True, 1), (False, 7)):
        check, outputs = HeadCheck(), hidden.roll(-shift, 0)
        check.compare(follower.target, [outputs[:20]], [hidden[:20]])  # too few rows to tell
        try:
            check.compare(follower.target, [outputs[20:-8]], [hidden[20:-8]])
            assert agrees
        except HeadDisagreesError as error:
            assert not agrees and " of 5" in str(error)
