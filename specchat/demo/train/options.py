"""Command lines from dataclasses: one flag per field, so that name, type and help are written once."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import NoneType
from typing import TypeVar, get_args, get_type_hints

import torch

Options = TypeVar("Options")


def parse(kind: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line into an instance of the dataclass `kind`.

    Args:
        kind: dataclass with fields `Annotated[type, "help"]`; a field without a default becomes a required flag.
        arguments: words of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=kind.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):  # type: ignore[arg-type]  # a type variable cannot be bound to "is a dataclass"
        wanted, help_text = get_args(hints[field.name])
        flag, required = "--" + field.name.replace("_", "-"), field.default is MISSING
        default = argparse.SUPPRESS if field.default in (MISSING, None) else field.default
        if wanted is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=help_text)
        else:
            plain = next((member for member in get_args(wanted) if member is not NoneType), wanted)
            parser.add_argument(flag, type=plain, required=required, default=default, help=help_text)
    return kind(**vars(parser.parse_args(arguments)))


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto` (CUDA if available), `cpu` or `cuda`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
