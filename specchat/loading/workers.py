"""The target on several machines, seen from the one with the terminal."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from specchat.errors import DifferentWeightsError
from specchat.loading.request import WorkersChoice
from specchat.models.checkpoint.digest import weights_digest
from specchat.paths import user_path
from specchat.records.model import ModelSource
from specchat.records.plan import Plan

if TYPE_CHECKING:
    from specchat.engine.engine import Engine
    from specchat.engine.workers.crew import Crew
    from specchat.models.packs.pack import Pack
    from specchat.models.weights.open import ModelWeights
    from specchat.planner.request import DeviceInputs


# Characters of a message that measures the rate of a link.
_ECHO = 1 << 20


@cache
def worker_inputs(workers: WorkersChoice) -> "tuple[DeviceInputs, ...]":
    """Return the memory and the speeds of all workers, and the way to them; asked once for all plans of a request.

    Raises:
        WorkerUnreachableError, WrongTokenError, VersionMismatchError: a worker cannot be used.
    """
    from specchat.engine.workers.crew import Crew
    from specchat.engine.workers.wire import shown
    from specchat.planner.peers import inputs_of
    from specchat.planner.request import Peer

    with Crew(workers.addresses, workers.token) as crew:
        answers = crew.ask("figures", [{}] * len(workers.addresses))
        short_s, long_s = ([_echo_s(crew, rank, count) for rank in range(1, crew.size)] for count in (1, _ECHO))
    found = []
    for address, answer, short, long in zip(workers.addresses, answers, short_s, long_s, strict=True):
        peer = Peer(shown(*address), short / 2, _ECHO / max(long - short, 1e-6))
        found.append(inputs_of(answer, peer))
    return tuple(found)


def _echo_s(crew: "Crew", rank: int, count: int) -> float:
    """Return the least seconds of two messages of some length to a worker, and their answers."""
    return min(crew.echo_s(rank, count) for _ in range(2))


def load_with_workers(
    workers: WorkersChoice,
    plan: Plan,
    weights: "ModelWeights",
    draft_weights: "ModelWeights | None",
    packs: "tuple[Pack | None, Pack | None]",
    warn: Callable[[str], None],
) -> "Engine":
    """Load an engine whose layers are on several machines, after all have compared versions and weights.

    Args:
        workers: the other machines.
        plan: plan to load.
        weights: weights of the target.
        draft_weights: weights of the draft; None without one.
        packs: packs of target and draft.
        warn: receives one-line warnings.

    Raises:
        UnsupportedModelError: the layers cannot be on several machines.
        WorkerUnreachableError, WrongTokenError, VersionMismatchError: a worker cannot be used.
        DifferentWeightsError: a worker has other weights.
        SpecchatError: a worker refuses, or is lost.
    """
    from specchat.engine.engine import Engine
    from specchat.engine.workers.crew import Crew
    from specchat.engine.workers.loading import check_apart, load_crew_target

    check_apart(weights)
    crew = Crew(workers.addresses, workers.token)
    try:
        _compare_weights(crew, plan, weights)
        load = partial(load_crew_target, crew=crew)
        return Engine.load(plan, weights, draft_weights, *packs, warn=warn, load=load)
    except BaseException:
        crew.close()
        raise


def _compare_weights(crew: "Crew", plan: Plan, weights: "ModelWeights") -> None:
    """Let all workers open the model, and compare their weights with those of this machine."""
    shapes = [(each.heads, each.key_dim, each.value_dim) for each in weights.kv_shapes]
    model = _model_values(weights.source)
    request = {"model": model, "quant": plan.quant, "dtype": plan.work.dtype, "kv_shapes": shapes}
    answers = crew.ask("open", [request] * (crew.size - 1))
    own = weights_digest(weights.source.path, weights.checkpoint)
    for rank, answer in enumerate(answers, 1):
        if answer["digest"] != own:
            raise DifferentWeightsError(
                f"{crew.name(rank)} has other weights of {weights.source.name} than this machine",
                hint="copy the model's folder, or name the same revision",
            )


def _model_values(source: ModelSource) -> dict[str, str]:
    """Return how another machine finds the same model: by its name, or by the path of its folder."""
    if source.revision is not None:
        return {"name": f"{source.name.partition('@')[0]}@{source.revision}"}
    typed = user_path(source.name)
    is_folder = source.name.startswith((".", "~", "/")) and typed.exists()
    if is_folder or Path(source.name).is_absolute():
        return {"name": os.path.abspath(typed)}  # noqa: PTH100  links stay as they are
    return {"name": source.name, "path": os.path.abspath(source.path)}  # noqa: PTH100
