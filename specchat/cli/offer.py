"""The offer to run the best model for this machine, for users who have named none."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from specchat.cli.ask import asker, can_ask
from specchat.cli.options import RunOptions
from specchat.errors import UsageError
from specchat.loading.locate import models_here
from specchat.loading.recommending import best_to_start, recommend_quickly
from specchat.paths import from_home
from specchat.units import format_bytes

if TYPE_CHECKING:
    from specchat.planner.recommendations import Recommendation
    from specchat.ui.console import Talk


def with_offered_model(options: RunOptions, say: "Talk") -> RunOptions:
    """Return options with the best model for this machine, if one can be offered.

    Args:
        options: options of `specchat run` without a model.
        say: stderr.

    Raises:
        UsageError: the user does not want the model.
    """
    best = best_to_start(recommend_quickly(options.models), offline=options.models.offline) if can_ask() else None
    if best is None:
        return options
    say.say(f"no MODEL is given; on this disk: {models_here()}")
    if not is_accepted(best, say):
        raise UsageError("no MODEL was chosen", hint="try `specchat run demo`, or `specchat probe` for other models")
    return replace(options, models=replace(options.models, model=best.model.id), yes=True)


def is_accepted(best: "Recommendation", say: "Talk") -> bool:
    """Offer a model, and return whether the user wants to run it."""
    say.say(f"best for this machine: {best.model.id}, about {best.prediction.tok_per_s:.2g} tok/s")
    return asker(yes=False)(_question(best))


def _question(best: "Recommendation") -> str:
    from huggingface_hub import constants

    if best.download_bytes == 0:
        return "run it now? it is on this disk"
    size, needed = format_bytes(best.download_bytes), best.disk_bytes - best.download_bytes
    copy = f", and {format_bytes(needed)} more for a copy that streams" if needed else ""
    return f"download {size} to {from_home(Path(constants.HF_HUB_CACHE))}{copy}, and run it?"
