"""Load the target of rank 0, or the layers of a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from specchat.engine.loading import load_model
from specchat.engine.model import TreeModel
from specchat.engine.workers.crew import Crew
from specchat.engine.workers.messages import RecordedCache
from specchat.engine.workers.models import CrewModel, PartModel
from specchat.engine.workers.route import Route
from specchat.engine.workers.wire import Message
from specchat.errors import UnsupportedModelError
from specchat.models.hf.parts import why_not_apart
from specchat.models.packs.pack import Pack
from specchat.models.weights.open import ModelWeights
from specchat.records.microbatches import WHOLE_PASSES
from specchat.records.plan import Placement, Plan, Workload


def check_apart(weights: ModelWeights) -> None:
    """Check that the layers of a model can be on several machines.

    Raises:
        UnsupportedModelError: layers that need more than rows, positions and masks.
    """
    if (reason := why_not_apart(weights.skeleton, weights.kv_shapes)) is not None:
        raise UnsupportedModelError(
            f"{weights.source.name} cannot be split over workers: '{weights.skeleton.config.model_type}' {reason}",
            hint="leave --workers out",
        )


def load_crew_target(
    plan: Plan, weights: ModelWeights, pack: Pack | None, warn: Callable[[str], None], crew: Crew
) -> TreeModel:
    """Load the layers of rank 0 with embeddings and head, while the workers load theirs.

    Args:
        plan: sizes and placement.
        weights: weights of the target.
        pack: pack of the target; None reads the checkpoint's own files.
        warn: receives one-line warnings.
        crew: workers that have opened the same model.

    Raises:
        LostWorkerError: a worker was lost.
        SpecchatError: a worker refuses to load.
    """
    placement, tree_rows = plan.placement, plan.work.tree_rows
    work = {name: value for name, value in asdict(plan.work).items() if name != "device"}
    common = {"owner": placement.owner, "size": crew.size, "work": work, "tree_rows": tree_rows}
    crew.begin(
        "load",
        [
            {**common, "rank": rank, "placement": asdict(placement.part(rank)), "device": placement.devices[rank]}
            for rank in range(1, crew.size)
        ],
    )
    route = Route(placement.owner, 0, crew.join())
    model = load_model(
        weights,
        plan.work,
        placement.part(0),
        cache_rows=plan.work.ctx + tree_rows,
        tree_rows=tree_rows,
        pack=pack,
        warn=warn,
        model_class=partial(CrewModel, route=route, crew=crew),
        cache_class=RecordedCache,
    )
    model.microbatches = placement.microbatches
    try:
        crew.answers()
    except BaseException:
        model.close()
        raise
    return model


def load_part(
    values: Message, weights: ModelWeights, device: str, pack: Pack | None, warn: Callable[[str], None], route: Route
) -> PartModel:
    """Load the layers of a worker; nothing outside of them is read.

    Args:
        values: request of rank 0 to load.
        weights: weights of the target.
        device: device of this machine.
        pack: pack of the target; None reads the checkpoint's own files.
        warn: receives one-line warnings.
        route: hops of this rank.
    """
    work = replace(Workload(device=device, **values["work"]), host_embeddings=False)
    model = load_model(
        weights,
        work,
        _placement(values["placement"]),
        cache_rows=work.ctx + values["tree_rows"],
        tree_rows=values["tree_rows"],
        pack=pack,
        warn=warn,
        model_class=partial(PartModel, route=route),
        reads_rest=False,
    )
    assert isinstance(model, PartModel)
    return model


def _placement(values: dict[str, Any]) -> Placement:
    """Return a placement from the values that JSON keeps; each pass comes with its number of microbatches."""
    found: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    return Placement(**{**found, "microbatches": WHOLE_PASSES})
