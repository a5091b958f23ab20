"""README, CONTRIBUTING and docs: their links lead somewhere, and their table of speeds is the planner's."""

import re
from pathlib import Path

import pytest
from support.speeds import BEGIN, END, table

from specchat.bench.readme import with_measured

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_exist(page):
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    paths = re.findall(r"`((?:specchat|tests|docs|man)/[\w./*-]+)`", page.read_text())
    assert all(list(ROOT.glob(path)) for path in paths), [path for path in paths if not list(ROOT.glob(path))]


def test_speeds_in_the_readme_are_those_of_the_golden_plans():
    page = (ROOT / "README.md").read_text()
    again = "PYTHONPATH=.:tests python -m support.speeds"
    assert page == with_measured(page, [table()], BEGIN, END), again
