"""Plots of the paper's figures: what is in them, the same bytes again, names that break nothing."""

import xml.etree.ElementTree as ET
from dataclasses import replace
from math import nan

import pytest

from a3tune.metrics.stats import Estimate
from a3tune.reproduce.experiments import Column, Experiment, experiments
from a3tune.reproduce.plots import draw
from a3tune.reproduce.tables import Cell, Table

SVG = "{http://www.w3.org/2000/svg}"


def _table(experiment: Experiment, columns: tuple[Column, ...] | None = None) -> Table:
    """Rising numbers, each three up and two down from the next."""
    measured = columns or experiment.columns
    cells = tuple(
        tuple(
            Cell(Estimate(10 * row + column + 20, 10 * row + column + 18, 10 * row + column + 23, 9), None)
            for column in range(len(measured))
        )
        for row in range(len(experiment.rows))
    )
    return Table(
        name=experiment.name,
        title=experiment.title,
        note="",
        columns=tuple(f"{column.data}, {column.metric}" for column in measured),
        measured=measured,
        rows=tuple(row.title for row in experiment.rows),
        cells=cells,
        comparable=True,
        about={"training seeds": "0"},
    )


def _drawn(experiment: Experiment, table: Table) -> ET.Element:
    svg = draw(experiment, table)
    assert svg is not None
    return ET.fromstring(svg)


def _texts(root: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", ["fig5a", "fig5b", "fig7b", "fig8"])
def test_a_sweep_is_a_line_over_the_swept_values(name: str):
    experiment = experiments()[name]
    root = _drawn(experiment, _table(experiment))
    texts = _texts(root)
    values = [f"{row.x:g}" for row in experiment.rows]
    assert len(set(values)) == len(experiment.rows)
    assert all(texts.count(value) >= 3 for value in values)  # in each panel
    assert experiment.axis in texts
    assert {"Open recall, %", "Closed accuracy, %", "Attention mass, %"} <= set(texts)
    assert any("Dotted: where performance peaks in the paper" in text for text in texts)
    assert experiment.peak in {row.x for row in experiment.rows}


@pytest.mark.parametrize("name", ["fig4", "fig7a"])
def test_rows_are_bars_with_their_numbers(name: str):
    experiment = experiments()[name]
    texts = _texts(_drawn(experiment, _table(experiment)))
    assert {row.title for row in experiment.rows} <= set(texts)
    assert {f"{10 * row + column + 20:.1f}" for row in range(len(experiment.rows)) for column in range(3)} <= set(texts)


def test_question_types_are_groups_of_bars():
    experiment = experiments()["fig9"]
    types = tuple(Column("slake", "answer", {"question_type": (name,)}) for name in ("Organ", "Cost in $", "a < b\x07"))
    root = _drawn(experiment, _table(experiment, types))
    texts = _texts(root)
    assert {"Organ", "Cost in $", r"a < b\x07", "LLaVA-Med + LoRA", "A3Tune", "Right answers, %"} <= set(texts)
    assert root.find(f".//{SVG}pattern") is not None  # a hatch tells the two series apart without colour


def test_who_cannot_see_it_is_told_every_number():
    experiment = experiments()["fig8"]
    root = _drawn(experiment, _table(experiment))
    assert root.get("role") == "img"
    names = {root.find(f"{SVG}{tag}").get("id"): root.find(f"{SVG}{tag}").text for tag in ("title", "desc")}
    assert root.get("aria-labelledby").split() == list(names)
    assert names["title"] == "fig8: Weight of the alignment, lambda"
    assert "slake, open_recall: lambda x 0.25 20.0 [18.0, 23.0], lambda x 0.5 30.0 [28.0, 33.0]" in names["desc"]


def test_the_same_numbers_are_the_same_bytes():
    for experiment in (experiments()["fig5b"], experiments()["fig7a"]):
        table = _table(experiment)
        assert draw(experiment, table) == draw(experiment, table)
        assert b"dc:date" not in draw(experiment, table)


def test_a_sweep_begun_has_its_whole_axis():
    experiment = experiments()["fig8"]
    table = _table(experiment)
    nothing = (Cell(None, None),) * 3
    begun = replace(table, cells=(nothing, nothing, table.cells[2], nothing, nothing))
    texts = _texts(_drawn(experiment, begun))
    assert all(texts.count(f"{row.x:g}") >= 3 for row in experiment.rows)


def test_what_is_missing_leaves_a_gap():
    experiment = experiments()["fig7a"]
    table = _table(experiment)
    nothing, alone = Cell(None, None), Cell(Estimate(50.0, nan, nan, 1), None)
    undefined = Cell(Estimate(nan, nan, nan, 0), None)
    first = replace(table, cells=((nothing, alone, undefined), *table.cells[1:]))
    texts = _texts(_drawn(experiment, first))
    assert "50.0" in texts and "20.0" not in texts and "LLaVA-Med + LoRA" in texts
    types = experiments()["fig9"]
    half = _table(types)
    half = replace(half, cells=((nothing,), half.cells[1]))
    assert "LLaVA-Med + LoRA" not in _texts(_drawn(types, half)) and "A3Tune" in _texts(_drawn(types, half))
    none = replace(table, cells=tuple((nothing, undefined, nothing) for _ in table.rows))
    assert draw(experiment, none) is None
