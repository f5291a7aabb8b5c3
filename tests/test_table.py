import csv
import io

from a3tune.evaluation.predictions import Cost
from a3tune.metrics.stats import Estimate
from a3tune.report.records import Comparison, MethodResult
from a3tune.report.table import comparison_tables

NAN = Estimate(float("nan"), float("nan"), float("nan"), 0)


def result(name: str, recall: float, accuracy: Estimate = NAN, p: float | None = None) -> MethodResult:
    scores = {"open_recall": Estimate(recall, recall - 0.1, recall + 0.1, 20), "closed_accuracy": accuracy}
    differences = {} if p is None else {"open_recall": Comparison(Estimate(0.2, 0.1, 0.3, 20), p)}
    return MethodResult(name, name, scores, differences)


METHODS = [result("greedy", 0.5), result("vcd_1", 0.7, p=0.01), result("opera", 0.6, p=0.2)]
COSTS = {"greedy": Cost(3, 2.0, 10), "vcd_1": Cost(5, 4.5, 20), "opera": Cost(40, 30, 110)}


def test_markdown_marks_best_second_and_significant():
    table = comparison_tables({"": METHODS}, COSTS, "greedy")
    head, _, greedy, vcd, opera = table.splitlines()[:5]
    assert head == "| Method | Open recall | Passes | Seconds |"
    assert greedy == "| greedy | 50.0 [40.0, 60.0] | 1.00x | 1.00x |"
    assert vcd == "| vcd_1 | **70.0**&ast; [60.0, 80.0] | 2.00x | 2.25x |"
    assert opera == "| opera | <u>60.0</u> [50.0, 70.0] | 11.00x | 15.00x |"
    assert "differs from greedy" in table


def test_latex_escapes_names():
    table = comparison_tables({"": METHODS}, COSTS, "greedy", ".tex")
    assert r"vcd\_1 & \textbf{70.0}* {\scriptsize [60.0, 80.0]} & 2.00x & 2.25x \\" in table
    assert r"\underline{60.0}" in table
    assert table.count(r"\\") == 4


def test_csv_is_unrounded():
    rows = list(csv.DictReader(io.StringIO(comparison_tables({"": METHODS}, COSTS, "greedy", ".csv"))))
    assert [row["method"] for row in rows] == ["greedy", "vcd_1", "opera"]
    assert float(rows[1]["mean"]) == 0.7
    assert float(rows[1]["p"]) == 0.01
    assert rows[0]["p"] == ""
    assert float(rows[2]["seconds"]) == 30


def test_equal_values_share_their_rank():
    methods = [result("a", 0.5), result("b", 0.5), result("c", 0.4)]
    table = comparison_tables({"": methods}, dict.fromkeys("abc", Cost()), "a")
    assert table.count("**50.0**") == 2
    assert table.count("<u>40.0</u>") == 1
    assert "| - | - |" in table  # nothing was counted


def test_what_nobody_has_is_left_out_and_what_one_lacks_is_a_dash():
    assert "Closed accuracy" not in comparison_tables({"": METHODS}, COSTS, "greedy")
    some = [result("greedy", 0.5, Estimate(0.25, 0.2, 0.3, 4)), *METHODS[1:]]
    assert "| vcd_1 | **70.0**&ast; [60.0, 80.0] | - |" in comparison_tables({"": some}, COSTS, "greedy")


def test_of_hallucination_the_lowest_is_best():
    rates = {"a": 0.4, "b": 0.2}
    methods = [
        MethodResult(name, name, {"hallucination": Estimate(rate, rate, rate, 9)}) for name, rate in rates.items()
    ]
    assert "| b | **20.0** [20.0, 20.0] |" in comparison_tables({"": methods}, dict.fromkeys(rates, Cost()), "a")
