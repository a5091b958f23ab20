"""The process behind `LlamaPython`: requests of llama.cpp's server as lines of JSON, answered by llama-cpp-python.

The process imports nothing large beside the package, so that its memory is that of llama.cpp.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, TextIO

_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def serve(settings: Mapping[str, Any], requests: TextIO, answers: TextIO) -> None:
    """Load a model, say so in a line, and answer one request a line until the requests end.

    Args:
        settings: arguments of `llama_cpp.Llama`.
        requests: lines of JSON, with the values of llama.cpp's server.
        answers: receives lines of JSON: tokens and timings, or an error.
    """
    from llama_cpp import Llama

    model = Llama(**settings, verbose=True)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        try:
            answer = complete(model, json.loads(line))
        except (ValueError, RuntimeError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def complete(model: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokens and timings of an answer, as llama.cpp's server does.

    Args:
        model: loaded `llama_cpp.Llama`.
        body: request to the server.
    """
    prompt, wanted = body["prompt"], min(body["n_predict"], model.n_ctx() - len(body["prompt"]))
    if wanted <= 0:
        raise ValueError(f"a prompt of {len(prompt)} tokens does not fit into {model.n_ctx()}")
    if not body["cache_prompt"]:
        model.reset()
    cached = _common(model.input_ids[: model.n_tokens].tolist(), prompt)
    model.set_seed(body["seed"])
    tokens, times, ends = [], [], _end_ids(model)
    for token in model.generate(
        prompt,
        top_k=body["top_k"],
        top_p=body["top_p"],
        min_p=body["min_p"],
        temp=body["temperature"],
        repeat_penalty=body["repeat_penalty"],
    ):
        tokens.append(int(token))
        times.append(time.perf_counter())
        if len(tokens) == wanted or tokens[-1] in ends:
            break
    timings = {"predicted_ms": 1e3 * (times[-1] - times[0]), "cache_n": min(cached, len(prompt) - 1)}
    return {"tokens": tokens, "timings": timings}


def _end_ids(model: Any) -> set[int]:
    """Return the tokens that end an answer, as the file names them."""
    return {model.token_eos(), *(int(model.metadata[key]) for key in _ENDS if key in model.metadata)}


def _common(known: Sequence[int], prompt: Sequence[int]) -> int:
    """Return the number of equal tokens at the begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, prompt, strict=False)))


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "w") as own:
        os.dup2(2, 1)
        serve(json.loads(sys.argv[1]), sys.stdin, own)
