"""`python -m support.fake_cli ARGUMENTS`: the real command line, screen and keys around an engine without a model.

FAKE_PAUSE_S is the time of a step, FAKE_LEAVE_WITHIN_S that within which a second Ctrl-C leaves, FAKE_SILENT_S that
after which a silent stdin is remarked on, FAKE_SLOW_S that of an answer which rings the bell. Loading ends when the
file FAKE_LOAD_GATE exists, and fails with FAKE_LOAD_FAILS. The answer repeats the question, which may ask for something
special (`TEXTS`). A worker is lost when the file FAKE_LOST exists, which is looked for every FAKE_IDLE_S. With "held"
before it the first step lasts until the file FAKE_GATE exists, with "gated" one half way; with "stuck" the first lasts
until the chat is left, with "frozen" for ever.
"""

import itertools
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from specchat.cli import stdin
from specchat.cli.app import main
from specchat.errors import DoesNotFitError, LostWorkerError
from specchat.loading import engine as engine_loading
from specchat.loading import planning
from specchat.models.checkpoint import generation_config
from specchat.models.checkpoint.generation_config import GenerationDefaults
from specchat.ui import idle, interrupts, repl
from support.fake_engine import CHOSEN, EOS, PLAN, TOKENIZER, FakeEngine
from support.plans import changed

PAUSE_S = float(os.environ.get("FAKE_PAUSE_S", "0"))
GATE = Path(os.environ.get("FAKE_GATE", "/nonexistent"))
LOST = Path(os.environ.get("FAKE_LOST", "/nonexistent"))
LOAD_GATE = Path(os.environ.get("FAKE_LOAD_GATE", "/"))
WORDS = " ".join(f"word{i}" for i in range(60))
MARKDOWN = """# A title

Some **bold** words and `code`, which go on for long enough to be wrapped on a narrow screen.

1. first
2. second

```python
def f(x):
    return x  # done
```

| name | size |
|------|-----:|
| a    |    1 |

The end."""
TEXTS = {
    "long": WORDS,
    "escape": "a\x1b[31mb\x07c\r\nd\x9b2J &#x202e;",
    "markdown": MARKDOWN,
    "lines": "\n".join(f"line {i}" for i in range(70)),
    "think": "<think>First this.\nThen that.</think>So it is.",
}


class Echo(FakeEngine):
    """Answers from the prompt."""

    def __init__(self):
        super().__init__([], pause=lambda: time.sleep(PAUSE_S))

    @classmethod
    def load(cls):
        _wait_until(LOAD_GATE.exists)
        if os.environ.get("FAKE_LOAD_FAILS"):
            raise DoesNotFitError("the model is too large", hint="try --vram 8GiB")
        return cls()

    def relieve(self):
        if LOST.exists():
            raise LostWorkerError("worker 1 (far:7000) is gone", hint="start the workers again")

    def close(self):
        if os.environ.get("FAKE_SAYS_CLOSED"):
            print("engine closed", file=sys.stderr)
        if file := os.environ.get("FAKE_WRITES_CLOSED"):
            Path(file).write_text("engine closed")

    def generate(self, prompt_ids, *arguments, **named):
        question, _, so_far = TOKENIZER.decode(prompt_ids).split("[user]")[-1].partition("\n[assistant]")
        if question == "crash":
            raise RuntimeError("the first line\nthe second line")
        text = TEXTS.get(re.sub("^(held|gated|stuck|frozen) ", "", question), f"You said: {question}")
        if question.startswith("ended") and so_far == text:
            text = ""  # nothing follows a whole answer to "ended ..."
        self.answers = [[*TOKENIZER.encode(text), EOS]]
        steps = super().generate(prompt_ids, *arguments, **named)
        cancel = named["cancel"]
        if question.startswith("frozen"):
            return self._gated(steps, 0, lambda: False)
        if question.startswith("stuck"):
            num_sets = _counting_sets(cancel)
            return self._gated(steps, 0, lambda: num_sets() > 1)
        if not question.startswith(("held", "gated")):
            return steps
        num_before = 0 if question.startswith("held") else len(text) // 6 + 1
        return self._gated(steps, num_before, lambda: GATE.exists() or cancel.is_set())

    def _gated(self, steps, num_before, opens):
        yield from itertools.islice(steps, num_before)
        _wait_until(opens)
        yield from steps


def _wait_until(condition):
    while not condition():
        time.sleep(0.005)


def _counting_sets(event):
    """How often it was set: to ask the answer to stop, and again when the chat leaves the answer."""
    sets, set_event = [], event.set

    def count_and_set():
        sets.append(1)
        set_event()

    event.set = count_and_set
    if event.is_set() and not sets:
        sets.append(1)
    return lambda: len(sets)


def _plan(_options, found, _warn, **_named):
    plan = changed(PLAN, target=found.target.name, draft=found.draft.name if found.draft else None)
    return planning.Planned(replace(CHOSEN, plan=plan), found)


def install():
    engine = ModuleType("specchat.engine.engine")
    engine.Engine = Echo
    compat = ModuleType("specchat.models.hf.tokenizer")
    compat.load_tokenizer = lambda _folder: TOKENIZER
    generation_config.load_generation_defaults = lambda _folder: GenerationDefaults(stop_ids=frozenset({EOS}))
    imports = ModuleType("specchat.models.hf.light_imports")
    imports.import_lightly = lambda: None  # a fake needs no transformers
    device = ModuleType("specchat.engine.device")
    device.release_memory = lambda: None  # and no torch
    sys.modules |= {each.__name__: each for each in (engine, compat, imports, device)}
    planning.make_plan = _plan
    engine_loading.load_planned = lambda _target, _draft, _plan, _reporter, _workers=None: Echo.load()
    stdin._SILENT_S = float(os.environ.get("FAKE_SILENT_S", stdin._SILENT_S))
    repl._SLOW_S = float(os.environ.get("FAKE_SLOW_S", repl._SLOW_S))
    idle._EVERY_S = float(os.environ.get("FAKE_IDLE_S", idle._EVERY_S))
    interrupts._LEAVE_WITHIN_S = float(os.environ.get("FAKE_LEAVE_WITHIN_S", interrupts._LEAVE_WITHIN_S))


if __name__ == "__main__":
    install()
    main()
