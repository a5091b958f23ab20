"""Plans and their records in tests: every value as a keyword, whichever record it belongs to."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from specchat.records.plan import Placement, Plan, Workload


def changed(plan: Plan, **changes: Any) -> Plan:
    """The plan with values replaced, in whichever of its records they are."""
    work, rest = split_values(Workload, changes)
    placement, rest = split_values(Placement, rest)
    return replace(plan, work=replace(plan.work, **work), placement=replace(plan.placement, **placement), **rest)


def split_values(record: type, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that are fields of a record, and the others."""
    names = {field.name for field in fields(record)}
    return {k: v for k, v in values.items() if k in names}, {k: v for k, v in values.items() if k not in names}
