"""`specchat run --plan`: the plan on stdout."""

import sys
from typing import TYPE_CHECKING

from specchat.cli.output import print_line
from specchat.json_lines import to_json

if TYPE_CHECKING:
    from specchat.loading.planning import Planned


def print_plan(planned: "Planned", *, as_json: bool) -> None:
    """Print the plan on stdout, as text or as JSON."""
    from specchat.chat.result import chosen_object
    from specchat.ui.console import columns
    from specchat.ui.plan_view import plan_text

    chosen, models = planned.chosen, planned.models
    if as_json:
        print_line(to_json(chosen_object(chosen)))
    else:
        print_line(plan_text(models.target, chosen, models.draft_note, columns(sys.stdout)))
