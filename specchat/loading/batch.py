"""Plan how many answers share a pass."""

from dataclasses import replace

from specchat.errors import DoesNotFitError
from specchat.loading.models import Models
from specchat.loading.planning import Planned, make_plan
from specchat.loading.request import ModelRequest, Reporter

# Numbers of answers to try. Each seat takes a context of cache from the resident layers.
_SEATS = (1, 2, 4, 8, 16, 32)
# More answers at once must be faster by this factor: each answer alone gets slower.
_LEAST_GAIN = 1.02


def make_batch_plan(
    request: ModelRequest,
    models: Models,
    reporter: Reporter,
    *,
    seats: int | None,
    num_prompts: int,
    temperature: float | None = None,
) -> Planned:
    """Choose the plan with the most tokens per second of all answers together.

    Args:
        request: models and choices of the user.
        models: models that were found.
        reporter: receives one line about statistics that cannot be read.
        seats: number of answers that share a pass; None tries several numbers.
        num_prompts: number of prompts; more seats are of no use.
        temperature: sampling temperature of the user; None leaves it to the model.

    Raises:
        DoesNotFitError: no plan stays within the budget.
    """
    from specchat.planner.explain import Alternative, Choice

    numbers = (min(seats, num_prompts),) if seats is not None else [each for each in _SEATS if each <= num_prompts]
    found = dict[int, Planned]()
    for number in numbers:
        asked = replace(request, choices=replace(request.choices, seats=number))
        try:
            found[number] = make_plan(asked, models, reporter, temperature=temperature)
        except DoesNotFitError:
            if not found:
                raise
            break  # more seats need more memory
    ranked = sorted(found, key=lambda number: -found[number].chosen.prediction.tok_per_s)
    best_per_s = found[ranked[0]].chosen.prediction.tok_per_s
    best = min(each for each in ranked if best_per_s <= _LEAST_GAIN * found[each].chosen.prediction.tok_per_s)
    other = next((each for each in ranked if each != best), None)
    alternative = None if other is None else Alternative(str(other), found[other].chosen.prediction.tok_per_s)
    why = "answers that share a pass; speeds are those of all answers together"
    choice = Choice("batch", str(best), why, seats is not None, alternative)
    chosen = found[best].chosen
    return replace(found[best], chosen=replace(chosen, choices=(choice, *chosen.choices)))
