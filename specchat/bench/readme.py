"""`python -m specchat.bench.readme docs/measured.md A.json ...` writes the tables of reports into a page.

The text between two marks is replaced. Sweeps have their own section. A section without a report stays unchanged.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from specchat.bench.compare import read_report
from specchat.bench.export import markdown
from specchat.errors import UsageError

BEGIN = "<!-- measured: python -m specchat.bench.readme docs/measured.md REPORT.json ... writes the text below -->"
END = "<!-- measured: end -->"
SWEEPS_BEGIN = "<!-- sweeps: python -m specchat.bench.readme docs/measured.md REPORT.json ... writes the text below -->"
SWEEPS_END = "<!-- sweeps: end -->"


def with_measured(page: str, sections: Sequence[str], begin_mark: str = BEGIN, end_mark: str = END) -> str:
    """Return the page with these sections between two marks.

    Raises:
        UsageError: the page lacks a mark.
    """
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise UsageError(f"the page lacks the marks {begin_mark} and {end_mark}")
    return "\n\n".join([before + begin_mark, *sections, end_mark + after])


def main(arguments: Sequence[str]) -> None:
    """Write reports into a page; the first argument is the page, the others are the reports."""
    page = Path(arguments[0])
    text = page.read_text(encoding="utf-8")
    reports = [read_report(Path(name)) for name in arguments[1:]]
    if measured := [markdown(each) for each in reports if not each.get("sweep")]:
        text = with_measured(text, measured)
    if sweeps := [markdown(each) for each in reports if each.get("sweep")]:
        text = with_measured(text, sweeps, SWEEPS_BEGIN, SWEEPS_END)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
