"""What the pages say about the house is what the tests of the house hold it to; and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from lit_peft import callbacks
from tests.test_house import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FUTURE = {"kernels"}  # rooms that are kept free for what comes


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    text = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\|\n)+", text, re.M)
    assert lines is not None, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_rooms_are_those_of_the_house() -> None:
    known = {name: set(allowed.split()) - FUTURE for name, allowed in ROOMS.items() if name not in FUTURE}
    listed = {}
    for names, _, allowed in rows("docs/architecture.md", "Rooms"):
        for name in re.findall(r"`(\w+)`", names):
            listed[name] = allowed
    assert set(listed) == set(known)
    for name, allowed in listed.items():
        if allowed.startswith("all of the above"):
            extra = set(filter(None, allowed.removeprefix("all of the above").strip(", ").split(", ")))
            below = set(known) - {"verbs", "cli", "__main__"}
            assert known[name] - {"verbs", "cli"} == below
            assert known[name] & {"verbs", "cli"} - {name} >= extra
        else:
            assert set(filter(None, allowed.split(", "))) == known[name], name


def test_every_callback_is_listed() -> None:
    listed = {name for names, *_ in rows("docs/python.md", "Callbacks") for name in re.findall(r"`(\w+)`", names)}
    assert listed == set(callbacks.__all__) - {"AdapterCallback"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
