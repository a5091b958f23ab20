"""A worker: layers of a model whose terminal is on another machine."""

import gc
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from specchat.errors import ModelNotFoundError, SpecchatError
from specchat.hardware.machine import Machine
from specchat.loading.engine import packed
from specchat.loading.locate import locate_models, parse_models
from specchat.loading.request import ModelRequest, Reporter
from specchat.models.checkpoint.digest import weights_digest
from specchat.records.model import LOWER_QUANTS, KvShape, ModelSource

if TYPE_CHECKING:
    from specchat.engine.workers.models import PartModel
    from specchat.engine.workers.route import Route
    from specchat.models.weights.open import ModelWeights


class MachineHost:
    """The models, the memory and the speeds of this machine, for `engine.workers.session`.

    Args:
        machine: device of the layers, and memory.
        vram_bytes: memory budget of the user in bytes; None for the default.
        model: MODEL that has the files here; None for the one that is asked for.
        reporter: receives progress and warnings.
    """

    def __init__(self, machine: Machine, vram_bytes: int | None, model: str | None, reporter: Reporter) -> None:
        self._machine = machine
        self._vram_bytes = vram_bytes
        self._model = model
        self._reporter = reporter
        self._weights: ModelWeights | None = None
        self._quant = "none"

    def figures(self, _values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the memory and the speeds of this machine."""
        from specchat.planner.inputs import figures_of

        machine, rates = figures_of(self._machine.device)
        return {"machine": asdict(machine), "rates": asdict(rates), "vram_bytes": self._vram_bytes}

    def open(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Open a model, and return the digest of its weights.

        Raises:
            ModelError: the model is not on this machine.
        """
        from specchat.engine.attention import tree_attention
        from specchat.models.weights.open import open_weights

        self.release()
        source = self._find(values["model"])  # the other machine has checked the architecture
        self._quant, shapes = values["quant"], tuple(KvShape(*each) for each in values["kv_shapes"])
        self._weights = open_weights(source, values["dtype"], self._quant, tree_attention, shapes)
        return {"digest": weights_digest(source.path, self._weights.checkpoint)}

    def load(self, values: Mapping[str, Any], route: "Route") -> "PartModel":
        """Load the layers that this machine computes.

        Raises:
            SpecchatError: the layers cannot be loaded.
        """
        from specchat.engine.workers.loading import load_part

        weights, self._weights = self._weights, None
        assert weights is not None, "a model is opened before it is loaded"
        with ExitStack() as undo:
            undo.enter_context(weights)
            streams = len(values["placement"]["resident"]) < values["owner"].count(values["rank"])
            needs_pack = streams or self._quant in LOWER_QUANTS
            pack = packed(weights, self._quant, self._reporter) if needs_pack else None
            model = load_part(values, weights, self._machine.device, pack, self._reporter.warn, route)
            undo.pop_all()
        return model

    def release(self) -> None:
        """Free everything that was opened or loaded."""
        from specchat.engine.device import release_memory

        if self._weights is not None:
            self._weights.close()
            self._weights = None
        gc.collect()
        release_memory()

    def _find(self, model: Mapping[str, str]) -> ModelSource:
        request = ModelRequest(self._model or model["name"], draft="none", offline=True)
        try:
            return locate_models(request, parse_models(request), self._reporter, lambda _: False).target
        except SpecchatError as error:
            if self._model is not None or "path" not in model:
                raise
            again = ModelRequest(model["path"], draft="none", offline=True)
            try:
                return locate_models(again, parse_models(again), self._reporter, lambda _: False).target
            except SpecchatError:
                raise ModelNotFoundError(error.message, error.hint) from error
