"""The known models for this machine, and the one that a user who names none is offered."""

from dataclasses import replace
from typing import TYPE_CHECKING

from specchat.loading.request import ModelRequest

if TYPE_CHECKING:
    from specchat.hardware.machine import Hardware, Measured
    from specchat.planner.recommendations import Recommendation, Recommendations


def recommend_models(request: ModelRequest, hardware: "Hardware", measured: "Measured | None") -> "Recommendations":
    """Return the known models for this machine with their plans, made from known sizes without a download.

    Args:
        request: choices that the user has fixed; its model is ignored.
        hardware: hardware of this machine.
        measured: rates of this machine; None for typical ones.
    """
    from specchat.hardware.probe import find_machine
    from specchat.models.hub.cache import cached_gguf, cached_models
    from specchat.planner.rates import rates_of
    from specchat.planner.recommendations import ANYTHING, find_recommendations

    machine = find_machine(request.choices.device)
    return find_recommendations(
        replace(ANYTHING, choices=request.choices, draft_is_open=request.draft_model != "none"),
        machine,
        rates_of(hardware, machine, measured),
        rates_of(hardware, machine),
        cached=(*cached_models(), *cached_gguf()),
        free_disk_bytes=hardware.disk.free_bytes,
    )


def recommend_quickly(request: ModelRequest) -> "Recommendations":
    """Return the known models for this machine by rates that were measured before, or by typical ones."""
    from specchat.hardware.probe import find_hardware, find_machine, remembered
    from specchat.paths import cache_folder

    folder = cache_folder()
    hardware, machine = find_hardware(folder), find_machine(request.choices.device)
    return recommend_models(request, hardware, remembered(folder, hardware, machine, request.choices.device))


def best_to_start(recommendations: "Recommendations", *, offline: bool) -> "Recommendation | None":
    """Return the best model that can be started after one yes; None if there is none.

    A gated model needs a licence agreement first, and without a network only models in the cache can be started.

    Args:
        recommendations: known models for this machine.
        offline: whether the network must not be used.
    """
    from huggingface_hub import constants

    is_offline = offline or constants.HF_HUB_OFFLINE
    for each in recommendations.best:
        if each.download_bytes == 0 or not (is_offline or (each.model.gated and not each.is_cached)):
            return each
    return None
