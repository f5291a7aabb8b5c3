"""One entry makes a metric known everywhere; a name without one is shown as it is."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from a3tune.evaluation.results import make_prediction, summarise
from a3tune.metrics.catalogue import (
    METRICS,
    Metric,
    answer_scores,
    attention_metrics,
    computed,
    describe,
    in_order,
    right,
)
from a3tune.metrics.reliance import Occluded, reliance_scores
from a3tune.report.formats import written
from a3tune.report.gather import EvaluatedRun, run_results
from a3tune.report.html import render
from a3tune.report.records import ReportData, RunResult
from a3tune.report.table import comparison_table
from a3tune.types import AnswerType, Filling, Part, Prediction, Sample

SAMPLES = [Sample(str(at), Path(f"{at}.png"), "Which?", "left lung", "open", meta={"organ": "lung"}) for at in range(9)]


def run(name: str, answer: str, attention: dict[str, float] | None = None) -> EvaluatedRun:
    predictions = tuple(make_prediction(sample, answer, attention) for sample in SAMPLES)
    return EvaluatedRun(name, name, predictions, {}, ())


def page(results: Sequence[RunResult]) -> str:
    return render(ReportData("A title", tuple(results), results[0].name, {}, 1, "", {}, {}, 0.15, "max"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(prediction: str, answer: str, answer_type: str, options: Sequence[str]) -> float | None:
        return float(prediction == answer) if answer_type == "open" else None

    monkeypatch.setitem(METRICS, "exact", Metric("Exact match", "Share of answers to the {letter}.", compute))


@pytest.mark.usefixtures("exact")
def test_one_entry_is_computed_compared_shown_and_explained():
    wrong, right = results = run_results([run("wrong", "lung"), run("right", "left lung")], SAMPLES, "wrong")
    assert (wrong.scores["exact"].mean, right.scores["exact"].mean) == (0, 1)
    assert right.differences["exact"].significant
    assert right.breakdown["organ"]["lung"]["exact"].mean == 1
    table = written([comparison_table(results, "wrong")], ".md")
    assert "Exact match" in table and "**100.0**&ast;" in table
    shown = page(results)
    assert "significantly higher in open recall" in shown and "exact match (100.0 against 0.0 %)" in shown
    assert "Share of answers to the {letter}." in shown


def test_a_metric_of_ones_own_of_attention_is_computed_for_every_map(monkeypatch: pytest.MonkeyPatch):
    def tokens(map_BN, region_BN, tau, normalisation):
        return (np.asarray(map_BN) >= tau).sum(-1).astype(float)

    monkeypatch.setitem(METRICS, "tokens", Metric("Tokens", "How many.", tokens, kind="attention", percent=False))
    maps, regions = np.array([[0.5, 0.3, 0.2, 0.0]]), np.array([[1, 0, 0, 0]])
    assert attention_metrics(maps, regions, tau=0.25)["tokens"] == 2
    assert describe("tokens_all_heads").title == "Tokens (all heads)" and not describe("tokens_all_heads").main


def test_what_nobody_knows_is_shown_under_its_own_name():
    results = run_results([run("a", "lung", {"depth <b>": 12.5}), run("b", "lung", {"depth <b>": 3.25})], SAMPLES, "a")
    assert results[0].scores["depth <b>"].mean == 12.5
    shown = page(results)
    further = shown.partition("Further scores")[2].partition("</details>")[0]
    assert "depth &lt;b&gt;" in further and "12.500" in further and "3.250" in further
    assert "Not known to this program" in shown
    assert "depth" not in written([comparison_table(results, "a")], ".md")


def test_every_score_that_we_compute_is_in_the_catalogue():
    texts = {"open": ("lung", "left lung"), "closed": ("yes", "no"), "choice": ("CT", "CT")}
    names = {name for kind, (said, truth) in texts.items() for name in answer_scores(said, truth, kind, ["CT", "MRI"])}  # pyright: ignore[reportArgumentType]
    names |= set(attention_metrics(np.ones((1, 4)), np.array([[1, 0, 0, 0]])))
    answers = {part: dict.fromkeys(get_args(Filling), "lung") for part in get_args(Part)}
    asked = make_prediction(SAMPLES[0], "lung")
    reliance = reliance_scores(asked, Occluded("0", "lung", answers, (-1.0, -2.0), (-1.0, -2.0)))
    assert all(describe(name).kind == "reliance" for name in reliance)
    assert (
        describe("reliance_inside_blur").title == "Reliance inside (blur)" and not describe("reliance_inside_blur").main
    )
    assert in_order(reliance)[:2] == ["reliance_inside", "reliance_outside"] and len(in_order(reliance)) == len(
        reliance
    )
    names |= reliance.keys() & METRICS.keys()
    assert names | {name for name, metric in METRICS.items() if metric.kind == "radiology"} == set(METRICS)
    assert set(computed("radiology")) == {
        name for name, metric in METRICS.items() if metric.kind == "radiology" and metric.main
    }
    titles = [describe(name).title for name in METRICS]
    assert len(set(titles)) == len(titles)


def test_order_is_that_of_the_catalogue_then_all_heads_then_the_unknown():
    given = ["zeta", "coverage_all_heads", "alpha", "coverage", "open_recall", "coverage"]
    assert in_order(given) == ["open_recall", "coverage", "coverage_all_heads", "alpha", "zeta"]
    assert describe("alpha").kind == describe("open_recall_all_heads").kind == "unknown"


@pytest.mark.parametrize(
    ("value", "signed", "percent", "plain"),
    [
        (0.1234, False, "12.3", "0.123"),
        (-0.1234, True, "-12.3", "-0.123"),
        (0.1234, True, "+12.3", "+0.123"),
        (-0.00001, True, "0.0", "0.000"),
        (math.nan, False, "", ""),
        (math.inf, True, "", ""),
    ],
)
def test_numbers_as_tables_show_them(value: float, signed: bool, percent: str, plain: str):
    metric = METRICS["coverage"]
    assert metric.text(value, signed=signed) == percent
    assert replace(metric, percent=False).text(value, signed=signed) == plain


def test_the_meaning_names_the_settings():
    assert "divided by its sum, is at least 0.3" in METRICS["coverage"].explained(0.3, "sum")


def test_summaries_hold_every_score():
    predictions = [make_prediction(sample, "lung", {"depth": 1.0}) for sample in SAMPLES]
    assert set(summarise(SAMPLES, predictions).metrics) == {"open_recall", "open_recall_clipped", "depth"}


@pytest.mark.parametrize(
    ("kind", "answer", "options", "said", "wanted"),
    [
        ("closed", "no", (), "No.", 1.0),
        ("closed", "no", (), "yes", 0.0),
        ("open", "left upper", (), "upper", 0.5),
        ("open", "cyst", (), "", 0.0),
        ("choice", "left lung", ("left lung", "left kidney"), "left kidney", 0.0),
        ("report", "No finding.", (), "No finding.", None),
    ],
)
def test_how_right_an_answer_is(
    kind: AnswerType, answer: str, options: tuple[str, ...], said: str, wanted: float | None
) -> None:
    asked = Prediction("i", "p", answer, kind, said, options=options)
    assert right(asked) == wanted
    assert right(replace(asked, prediction="other"), said) == wanted, "another text in the place of its answer"
