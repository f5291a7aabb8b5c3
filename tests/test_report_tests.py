"""Right answers test by test: which questions belong together, what is compared, and what stays out."""

from pathlib import Path

import numpy as np
import pytest

from a3tune.evaluation.results import MOST_TESTS
from a3tune.report.tests import right_by_test
from a3tune.types import Prediction, Sample


def samples(tests: list[str]) -> list[Sample]:
    about = [{"test": test, "patient": f"{number}"} for number, test in enumerate(tests)]
    return [
        Sample(f"q{number}", image=Path(f"{number}.png"), prompt="p?", answer="cyst", answer_type="open", meta=own)
        for number, own in enumerate(about)
    ]


def answers(rows: list[Sample], right: list[bool]) -> list[Prediction]:
    return [
        Prediction(row.id, row.prompt, row.answer, "open", row.answer if known else "mass", dict(row.meta))
        for row, known in zip(rows, right, strict=True)
    ]


def test_shares_and_differences_are_of_the_questions_of_a_test():
    rows = samples(["disagree", "agree"] * 10)
    lora = answers(rows, [row.meta["test"] == "agree" for row in rows])
    found = right_by_test({"lora": lora, "mine": answers(rows, [True] * 20)}, rows, "lora")
    assert list(found) == ["disagree", "agree"]
    assert [found[test]["lora"].share.mean for test in found] == [0, 1]
    assert all(found[test]["lora"].comparison is None for test in found)
    change, same = (found[test]["mine"].comparison for test in found)
    assert change is not None and change.significant and change.difference.mean == 1
    assert same is not None and not same.significant and same.difference.mean == 0


def test_p_values_are_adjusted_over_runs_and_tests():
    rows = samples(["one"] * 12)
    right = [[number < most for number in range(12)] for most in (6, 12, 12, 12)]
    runs = {f"run{number}": answers(rows, own) for number, own in enumerate(right)}
    alone = right_by_test({name: runs[name] for name in ("run0", "run1")}, rows, "run0")["one"]["run1"].comparison
    among = right_by_test(runs, rows, "run0")["one"]["run1"].comparison
    assert alone is not None and among is not None and alone.p is not None
    assert among.p == pytest.approx(3 * alone.p)


def test_questions_that_name_no_test_have_none():
    rows = [Sample("q", image=Path("q.png"), prompt="p?", answer="cyst", answer_type="open")]
    assert right_by_test({"lora": answers(rows, [True])}, rows, "lora") == {}


def test_reports_are_not_right_or_wrong():
    rows = samples(["one"])
    report = [Prediction(rows[0].id, "p?", "No finding.", "report", "No finding.", dict(rows[0].meta))]
    assert np.isnan(right_by_test({"lora": report}, rows, "lora")["one"]["lora"].share.mean)


def test_another_thing_that_is_called_test_makes_no_tests():
    rows = samples([f"blood test {number}" for number in range(MOST_TESTS + 1)])
    assert right_by_test({"lora": answers(rows, [True] * len(rows))}, rows, "lora") == {}
    assert len(right_by_test({"lora": answers(rows[1:], [True] * MOST_TESTS)}, rows[1:], "lora")) == MOST_TESTS
