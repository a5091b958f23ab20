"""`python -m support.fake_cli ARGUMENTS`: the real command line, screen and keys around an engine without a model.

FAKE_PAUSE_S is the time of a step, FAKE_FIRST_PAUSE_S that before the first of a chat, FAKE_LOAD_S that of loading;
FAKE_LOAD_FAILS makes that fail. The answer repeats the question, which may ask for something special (`TEXTS`) and with
"gated" stops half way until the file FAKE_GATE exists.
"""

import itertools
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from specchat.cli.app import main
from specchat.errors import DoesNotFitError
from specchat.loading import engine as engine_loading
from specchat.loading import planning
from specchat.models.checkpoint import generation_config
from specchat.models.checkpoint.generation_config import GenerationDefaults
from support.fake_engine import CHOSEN, EOS, PLAN, TOKENIZER, FakeEngine
from support.loading import changed

PAUSE_S = float(os.environ.get("FAKE_PAUSE_S", "0"))
GATE = Path(os.environ.get("FAKE_GATE", "/nonexistent"))
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
        super().__init__([], pause=self._pause)
        self._pauses = itertools.chain([float(os.environ.get("FAKE_FIRST_PAUSE_S", "0"))], itertools.repeat(PAUSE_S))

    def _pause(self):
        time.sleep(next(self._pauses))

    @classmethod
    def load(cls):
        time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
        if os.environ.get("FAKE_LOAD_FAILS"):
            raise DoesNotFitError("the model is too large", hint="try --vram 8GiB")
        return cls()

    def close(self):
        print("engine closed", file=sys.stderr) if os.environ.get("FAKE_SAYS_CLOSED") else None

    def generate(self, prompt_ids, *arguments, **named):
        question = TOKENIZER.decode(prompt_ids).split("[user]")[-1].split("\n[assistant]")[0]
        if question == "crash":
            raise RuntimeError("the first line\nthe second line")
        text = TEXTS.get(question.removeprefix("gated "), f"You said: {question}")
        self.answers = [[*TOKENIZER.encode(text), EOS]]
        steps = super().generate(prompt_ids, *arguments, **named)
        return self._gated(steps, len(text) // 6, named["cancel"]) if question.startswith("gated") else steps

    def _gated(self, steps, num_before, cancel):
        for number, step in enumerate(steps):
            yield step
            while number == num_before and not GATE.exists() and not cancel.is_set():
                time.sleep(0.005)


def _plan(_options, found, _warn, **_named):
    plan = changed(PLAN, target=found.target.name, draft=found.draft.name if found.draft else None)
    return planning.Planned(replace(CHOSEN, plan=plan), found)


def install():
    engine = ModuleType("specchat.engine.engine")
    engine.Engine = Echo
    compat = ModuleType("specchat.models.hf.tokenizer")
    compat.load_tokenizer = lambda _folder: TOKENIZER
    generation_config.load_generation_defaults = lambda _folder: GenerationDefaults(stop_ids=frozenset({EOS}))
    sys.modules |= {"specchat.engine.engine": engine, "specchat.models.hf.tokenizer": compat}
    planning.make_plan = _plan
    engine_loading.load_planned = lambda _target, _draft, _plan, _reporter: Echo.load()


if __name__ == "__main__":
    install()
    main()
