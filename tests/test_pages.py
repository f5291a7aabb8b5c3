"""What docs/paper.md and docs/architecture.md name is there: files, tests, functions, tables and figures."""

import re
from pathlib import Path

import pytest

from a3tune.reproduce.experiments import experiments

ROOT = Path(__file__).parents[1]
PLACES = (ROOT / "src" / "a3tune", ROOT / "tests", ROOT / "docs", ROOT)
PAGES = [ROOT / "docs" / name for name in ("paper.md", "architecture.md")]
NAME = re.compile(r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*\w+\.(?:py|md))(?:: (\w+))?`")
"""A folder or a file, and after a colon what is in it."""


def _absent(text: str) -> list[str]:
    """What is named and not there. Further files of a line may lie where its first one does."""
    absent = []
    for line in text.splitlines():
        beside: list[Path] = []
        for name, inside in NAME.findall(line):
            found = [place / name for place in (*PLACES, *beside) if (place / name).exists()]
            if not found or (inside and not re.search(rf"^(def|class) {inside}\b", found[0].read_text(), re.M)):
                absent.append(f"{name}: {inside}" if inside else name)
            beside = beside or [path.parent for path in found]
    return absent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path):
    text = page.read_text()
    assert len(NAME.findall(text)) > 20
    assert _absent(text) == []


def test_what_is_not_there_is_found():
    text = "| `labels/store.py`, `table.py`, `prompts/` | `labels/choose.py: top_k`, `no.py`, `files.py: nothing` |"
    assert _absent(text) == ["prompts/", "labels/choose.py: top_k", "no.py", "files.py: nothing"]


def test_every_table_and_figure_has_its_command():
    named = set(re.findall(r"`((?:table|fig)\d+[ab]?)`", PAGES[0].read_text()))
    assert named == set(experiments())


def test_the_readme_maps_every_room():
    text = (ROOT / "README.md").read_text()
    block = text[text.index("```text\ncli/") :].partition("```text\n")[2].partition("```")[0]
    mapped = [line.split()[0] for line in block.splitlines()]
    rooms = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "src" / "a3tune").iterdir()}
    assert sorted(mapped) == sorted(room for room in rooms if not room.startswith("__") and room != "py.typed")
    described = PAGES[1].read_text()
    assert [room for room in mapped if f"`{room}`" not in described and room != "assets/"] == []
