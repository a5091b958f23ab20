"""The record of a model in the store of another program."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StoredModel:
    """A model that another program has downloaded; specchat reads it in place and never changes it.

    Attributes:
        name: MODEL as it is listed, such as "ollama:llama3.2:3b".
        origin: name of the other program.
        path: GGUF file, folder of safetensors, or for an unreadable entry the file that describes it.
        nbytes: size on disk in bytes.
        removal: the way to remove the model in that program.
        other_names: further names that `specchat run` takes.
        problem: reason why the model cannot be run; empty if its format is read.
    """

    name: str
    origin: str
    path: Path
    nbytes: int
    removal: str
    other_names: tuple[str, ...] = ()
    problem: str = ""
