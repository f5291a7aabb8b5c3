"""Compared results as one table, and what each format makes of it."""

import csv
import io
from collections.abc import Mapping, Sequence

import pytest

from a3tune.evaluation.predictions import Cost
from a3tune.metrics.stats import Estimate
from a3tune.report.formats import written
from a3tune.report.records import Comparison, RunResult
from a3tune.report.table import comparison_table

NAN = Estimate(float("nan"), float("nan"), float("nan"), 0)


def result(name: str, recall: float, accuracy: Estimate = NAN, p: float | None = None) -> RunResult:
    scores = {"open_recall": Estimate(recall, recall - 0.1, recall + 0.1, 20), "closed_accuracy": accuracy}
    differences = {} if p is None else {"open_recall": Comparison(Estimate(0.2, 0.1, 0.3, 20), p)}
    return RunResult(name, name, scores, differences)


RESULTS = [result("greedy", 0.5), result("vcd_1", 0.7, p=0.01), result("opera", 0.6, p=0.2)]
COSTS = {"greedy": Cost(3, 2.0, 10), "vcd_1": Cost(5, 4.5, 20), "opera": Cost(40, 30, 110)}


def text(results: Sequence[RunResult], costs: Mapping[str, Cost], form: str = ".md") -> str:
    return written([comparison_table(results, results[0].name, costs=costs)], form)


def lines(results: Sequence[RunResult]) -> list[dict[str, str]]:
    """What the CSV holds."""
    return list(csv.DictReader(io.StringIO(text(results, {each.name: Cost() for each in results}, ".csv"))))


def ranks(metric: str, *means: float) -> list[int]:
    results = [RunResult(str(at), str(at), {metric: Estimate(mean, mean, mean, 9)}) for at, mean in enumerate(means)]
    return [row.cells[metric].rank for row in comparison_table(results, "0").rows]


def test_markdown_marks_best_second_and_significant():
    table = text(RESULTS, COSTS)
    head, _, greedy, vcd, opera = table.splitlines()[:5]
    assert head == "| Method | Open recall | Passes | Seconds |"
    assert greedy == "| greedy | 50.0 [40.0, 60.0] | 1.00x | 1.00x |"
    assert vcd == "| vcd_1 | **70.0**&ast; [60.0, 80.0] | 2.00x | 2.25x |"
    assert opera == "| opera | <u>60.0</u> [50.0, 70.0] | 11.00x | 15.00x |"
    assert "differs from greedy" in table


ALONE = Estimate(0.2, 0.1, 0.3, 20)
"""A difference whose interval leaves out 0."""


@pytest.mark.parametrize(
    ("p", "shown", "direction"),
    [
        (0.0004, "p < .001", "higher"),
        (0.0499, "p = .049", "higher"),
        (0.0504, "p = .050", "same"),
        (0.2, "p = .200", "same"),
        (1.0, "p = 1.000", "same"),
        (None, "", "higher"),
        (float("nan"), "", "same"),
    ],
)
def test_a_change_says_by_which_adjusted_p(p: float | None, shown: str, direction: str):
    scores = {"open_recall": Estimate(0.5, 0.4, 0.6, 20)}
    runs = [RunResult("a", "a", scores), RunResult("b", "b", scores, {"open_recall": Comparison(ALONE, p)})]
    change = comparison_table(runs, "a").rows[1].cells["open_recall"].change
    assert change is not None
    assert (change.p, change.direction, change.interval) == (shown, direction, "[10.0, 30.0]")


@pytest.mark.parametrize("form", [".md", ".tex"])
def test_a_table_says_that_its_intervals_are_not_adjusted(form: str):
    assert "of each mean alone, not adjusted" in text(RESULTS, COSTS, form)


@pytest.mark.parametrize("form", [".md", ".tex", ".csv"])
def test_what_is_no_number_is_never_written(form: str):
    alone = RunResult("a", "a", {"open_recall": Estimate(0.5, float("nan"), float("nan"), 1), "coverage": NAN})
    other = RunResult("b", "b", alone.scores, {"open_recall": Comparison(NAN, float("nan"))})
    assert "nan" not in text([alone, other], {"a": Cost(), "b": Cost()}, form).lower()


def test_why_runs_cannot_be_compared_stands_in_every_line_of_the_csv():
    table = comparison_table(RESULTS, "greedy", unlike={"answer": "=cut at 3 and 5"})
    rows = list(csv.DictReader(io.StringIO(written([table], ".csv"))))
    assert {row["unlike"] for row in rows} == {"'=cut at 3 and 5"}
    assert "**" not in written([table], ".md")


def test_latex_escapes_names():
    table = text(RESULTS, COSTS, ".tex")
    assert r"vcd\_1 & \textbf{70.0}* {\scriptsize [60.0, 80.0]} & 2.00x & 2.25x \\" in table
    assert r"\underline{60.0}" in table
    assert table.count(r"\\") == 4


def test_csv_is_unrounded():
    rows = list(csv.DictReader(io.StringIO(text(RESULTS, COSTS, ".csv"))))
    assert [row["method"] for row in rows] == ["greedy", "vcd_1", "opera"]
    assert float(rows[1]["mean"]) == 0.7
    assert float(rows[1]["p"]) == 0.01
    assert rows[0]["p"] == rows[0]["significant"] == ""
    assert [row["significant"] for row in rows[1:]] == ["yes", "no"]  # of equal intervals: p decides
    assert {(row["difference_low"], row["difference_high"]) for row in rows[1:]} == {("0.1", "0.3")}
    assert float(rows[2]["seconds"]) == 30


@pytest.mark.parametrize(
    ("means", "wanted"),
    [
        ((0.5, 0.5, 0.4), [1, 1, 2]),
        ((0.70004, 0.69996, 0.6), [1, 1, 2]),  # both are 70.0 as shown
        ((0.7, 0.6, 0.6, 0.5), [1, 2, 2, 0]),
        ((0.5, 0.5), [0, 0]),  # where all are equal nobody is best
        ((0.50001, 0.49999), [0, 0]),
        ((0.5,), [0]),
        ((float("nan"), 0.5), [0, 0]),
        ((float("nan"), 0.5, 0.4), [0, 1, 2]),
    ],
)
def test_numbers_that_are_shown_alike_share_their_rank(means: tuple[float, ...], wanted: list[int]):
    assert ranks("open_recall", *means) == wanted


def test_of_hallucination_the_lowest_is_best():
    assert ranks("hallucination", 0.4, 0.2) == [2, 1]
    assert ranks("open_recall", 0.4, 0.2) == [1, 2]


def test_nobody_is_best_in_what_nobody_knows():
    assert ranks("somebody's own", 0.4, 0.2) == [0, 0]


def test_what_was_not_counted_is_a_dash():
    assert text(RESULTS, dict.fromkeys(COSTS, Cost())).count("| - | - |") == 3


def test_what_nobody_has_is_left_out_and_what_one_lacks_is_a_dash():
    assert "Closed accuracy" not in text(RESULTS, COSTS)
    some = [result("greedy", 0.5, Estimate(0.25, 0.2, 0.3, 4)), *RESULTS[1:]]
    assert "| vcd_1 | **70.0**&ast; [60.0, 80.0] | - |" in text(some, COSTS)


@pytest.mark.parametrize("name", ["open_recall_clipped", "coverage_all_heads", "somebody's own", "=1+1"])
def test_further_scores_are_in_the_csv_and_not_in_the_main_table(name: str):
    results = [RunResult(each.name, each.name, {**each.scores, name: Estimate(0.5, 0.4, 0.6, 7)}) for each in RESULTS]
    assert text(results, COSTS) == text([RunResult(each.name, each.name, each.scores) for each in RESULTS], COSTS)
    found = [line for line in lines(results) if line["metric"].lstrip("'") == name]
    assert [(line["mean"], line["count"], line["p"]) for line in found] == [("0.5", "7", "")] * 3
    assert not any(line["metric"].startswith("=") for line in found)
