"""`python -m specchat.bench.readme README.md A.json ...`: writes the figures of reports into a page, never by hand.

What stands between the two marks is replaced; everything else stays as it is.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from specchat.bench.compare import read_report
from specchat.bench.export import markdown
from specchat.errors import UsageError

BEGIN = "<!-- measured: python -m specchat.bench.readme README.md REPORT.json ... writes what stands below -->"
END = "<!-- measured: end -->"


def with_measured(page: str, sections: Sequence[str]) -> str:
    """The page with these sections between its marks.

    Raises:
        UsageError: the page lacks a mark.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the page lacks the marks {BEGIN} and {END}")
    return "\n\n".join([before + BEGIN, *sections, END + after])


def main(arguments: Sequence[str]) -> None:
    """Rewrites the page named first with the reports named after it."""
    page = Path(arguments[0])
    sections = [markdown(read_report(Path(name))) for name in arguments[1:]]
    page.write_text(with_measured(page.read_text(encoding="utf-8"), sections), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
