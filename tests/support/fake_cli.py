"""`python -m support.fake_cli ARGUMENTS`: the real command line, screen and keys around an engine without a model.

FAKE_PAUSE_S is the time of a step, FAKE_FIRST_PAUSE_S that before the first of a chat. The answer repeats the
question, which may ask for something special in it.
"""

import itertools
import os
import sys
import time
from dataclasses import replace
from types import ModuleType, SimpleNamespace

from specchat.cli import models
from specchat.cli.app import main
from support.fake_engine import EOS, PLAN, TOKENIZER, FakeEngine

PAUSE_S = float(os.environ.get("FAKE_PAUSE_S", "0"))
WORDS = " ".join(f"word{i}" for i in range(60))


class Echo(FakeEngine):
    """Answers from the prompt."""

    def __init__(self):
        super().__init__([], pause=self._pause)
        self._pauses = itertools.chain([float(os.environ.get("FAKE_FIRST_PAUSE_S", "0"))], itertools.repeat(PAUSE_S))

    def _pause(self):
        time.sleep(next(self._pauses))

    @classmethod
    def load(cls, _plan, _target, _draft, _pack):
        return cls()

    def close(self):
        print("engine closed", file=sys.stderr) if os.environ.get("FAKE_SAYS_CLOSED") else None

    def generate(self, prompt_ids, *arguments, **named):
        question = TOKENIZER.decode(prompt_ids).split("[user]")[-1].split("\n[assistant]")[0]
        if question == "begin":
            print("begun", file=sys.stderr)  # from here on Ctrl-C means the answer
        if question == "crash":
            raise RuntimeError("the first line\nthe second line")
        text = {"long": WORDS, "escape": "a\x1b[31mb\x07c\r\nd\x9b2J"}.get(question, f"You said: {question}")
        self.answers = [[*TOKENIZER.encode(text), EOS]]
        return super().generate(prompt_ids, *arguments, **named)


def _plan(_options, found):
    return replace(PLAN, target=found.target.name, draft=found.draft.name if found.draft else None)


def install():
    engine = ModuleType("specchat.engine.engine")
    engine.Engine = Echo
    compat = ModuleType("specchat.models.hf_compat")
    compat.load_tokenizer = lambda _folder: TOKENIZER
    compat.load_generation_defaults = lambda _folder: SimpleNamespace(
        do_sample=None, temperature=None, repetition_penalty=None, stop_ids=frozenset({EOS})
    )
    sys.modules |= {"specchat.engine.engine": engine, "specchat.models.hf_compat": compat}
    models.make_plan = _plan
    models.make_pack = lambda *_: None


if __name__ == "__main__":
    install()
    main()
