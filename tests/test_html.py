"""The page: honest sentences, escaped text, nothing from outside, nothing private."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from a3tune.config import DataConfig, LabelsConfig, RunConfig
from a3tune.config.public import public_settings
from a3tune.metrics.catalogue import METRICS
from a3tune.metrics.stats import Estimate
from a3tune.report.formats import written
from a3tune.report.html import duration, public_command, render
from a3tune.report.logs import curves_from_log, experts_from_log, heads_from_log
from a3tune.report.records import (
    Case,
    Cases,
    Comparison,
    Curve,
    ExpertUse,
    LabelQuality,
    LabelScores,
    ReportData,
    RightAnswers,
    RunResult,
    View,
)
from a3tune.report.summary import by_test, headline, number, summary
from a3tune.report.table import comparison_table

NAN = float("nan")
EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(HTMLParser):
    """Tags with attributes and visible text; complains about tags that are closed in the wrong order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


class _Tables(HTMLParser):
    """Cells of every table as they are read: title of the row, title of the column, text after its meaning."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[dict[str, dict[str, str]]] = []
        self._row, self._column, self._in = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag == "table":
            self.tables.append({})
        if tag == "th" and own.get("scope") == "row":
            self._row, self._in = "", tag
        if tag == "td":
            self._column, self._in = str(own["data-label"]), tag
            tone = f"{own['class']}: " if own.get("class") in ("good", "bad", "same") else ""
            self.tables[-1].setdefault(self._row, {})[self._column] = tone
        if tag == "span" and own.get("class") == "interval" and self._in == "td":
            self.tables[-1][self._row][self._column] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag == self._in:
            self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "th":
            self._row += data.strip()
        if self._in == "td":
            self.tables[-1][self._row][self._column] += data


def _tables(text: str) -> list[dict[str, dict[str, str]]]:
    return _Tables(text).tables


def _estimate(mean: float, half: float = 0.02) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 120)


def _result(name: str, level: float, differences: dict[str, Comparison] | None = None, text: str = "") -> RunResult:
    return RunResult(
        name,
        text or name.upper(),
        {metric: _estimate(level) for metric in METRICS},
        differences or {},
        {text or "question_type": {text or "kind": {"open_recall": _estimate(level)}}},
        {"loss_llm": Curve(np.array([1, 2]), np.array([2.0, 1.0]))},
        {"query": ExpertUse((0.7, 0.3), 0.61)},
        np.full((2, 3), 0.5),
    )


def _data(text: str = "", **changes: object) -> ReportData:
    region = np.zeros((8, 8), dtype=bool)
    region[2:5, 3:6] = True
    views = tuple(View(text or "LoRA", text or "cyst", score, np.ones((8, 8)), 0.14) for score in (1.0, 0.5, 0.0))
    question, answer, reason, tags = (text or "What?", text or "cyst", text or "random", (text or "CT",))
    case = Case(np.zeros((8, 8), np.uint8), question, answer, region, (region,), views, reason, tags)
    scores = LabelScores(0.71, 0.52, 0.83, 812)
    own = RightAnswers(_estimate(0.6), Comparison(_estimate(0.1)))
    better = {"open_recall": Comparison(_estimate(0.05)), "closed_accuracy": Comparison(_estimate(0.01))}
    data = ReportData(
        title=text or "A title",
        results=tuple(_result(*of, text=text) for of in (("base", 0.3), ("lora", 0.5), ("a3tune", 0.6, better))),
        reference="lora",
        counts={text or "questions": 2000},
        seeds=1,
        command=text or "a3tune demo",
        settings={text or "labels.top_k": text or "4"},
        seconds={text or "train": 61.0},
        tau=0.15,
        normalisation="max",
        tests={text: {"base": own, "lora": RightAnswers(_estimate(0.5), None), "a3tune": own}} if text else {},
        question_only=RunResult("q", text or "Question only", {"open_recall": _estimate(0.2)}),
        labels=LabelQuality(4, 0.5, scores, {text or "chest": scores}),
        cases=Cases(text or "By rule.", (case,)),
        synthetic=True,
        notes=(text or "A note.",),
        environment={text or "torch": text or "2.9"},
    )
    return replace(data, **changes)  # type: ignore[arg-type]


def test_everything_from_data_is_escaped() -> None:
    page = _Page(render(_data(EVIL)))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("alert(1)") > 15 and "{{ 7*7 }}" in page.text and "49" not in page.text


def test_page_is_self_contained() -> None:
    text = render(_data())
    for _, attributes in _Page(text).tags:
        for name in ("src", "href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:image/png;base64,"))
    assert "default-src 'none'" in text and not re.search(r"@import|url\(|https?://", text)


def test_half_a_surrogate_pair_can_be_written() -> None:
    assert render(_data("a\ud83d b")).encode("utf-8")


def test_pictures_and_tables_speak() -> None:
    page = _Page(render(_data()))
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert tables == 9 == sum(tag == "caption" for tag, _ in page.tags)
    for word in (
        "right: ",
        "partly: ",
        "wrong: ",
        "✓",
        "✗",
        "not a medical device",
        "synthetic",
        "divided by its largest",
    ):
        assert word in page.text


def test_best_is_bold_and_second_underlined() -> None:
    text = render(_data())
    scores = [row["Open recall"].split("[")[0].strip() for row in _tables(text)[0].values()]
    assert scores == ["30.0", "50.0 second", "60.0 best"]


def test_an_answer_that_is_no_right_or_wrong_has_no_sign() -> None:
    cases = _data().cases
    assert cases is not None
    case = cases.cases[0]
    ungraded = replace(cases, cases=(replace(case, views=tuple(replace(view, right=None) for view in case.views)),))
    assert render(_data()).count('class="sign"') == 3
    assert 'class="sign"' not in render(_data(cases=ungraded))


def test_summary_says_what_is_and_what_is_not_significant() -> None:
    text = " ".join(summary(_data()))
    assert "A3TUNE is significantly higher in open recall (60.0 against 50.0 %)" in text
    assert "no significant difference in closed accuracy" in text
    assert "2,000 questions" in text
    assert "BASE is" not in text


def test_each_test_of_the_questions_has_a_sentence_a_chart_and_differences() -> None:
    up, open_ = Comparison(Estimate(0.3, 0.2, 0.4, 120), p=0.01), Comparison(Estimate(0.3, 0.2, 0.4, 120), p=0.2)
    shares = {"base": RightAnswers(_estimate(0.2), open_), "lora": RightAnswers(_estimate(0.5), None)}
    tests = {
        "where a mark lies": {**shares, "a3tune": RightAnswers(_estimate(0.8), up)},
        "in none": {**shares, "a3tune": RightAnswers(_estimate(0.8), open_)},
    }
    data = _data(tests=tests)
    assert by_test(data) == (
        "A3TUNE against LORA, right answers: where a mark lies, 80 against 50 % (95 % interval +20 to +40 points); in "
        "none, 80 against 50 % (which may be chance)."
    )
    page = _Page(render(data))
    assert by_test(data) in page.text and "Where a mark lies" in page.text
    assert page.text.index("Where a mark lies") < page.text.rindex("All measures")
    assert by_test(_data()) == "" and "All measures" not in _Page(render(_data())).text
    assert "Against LORA" in page.text
    alone = _data(results=(_result("lora", 0.5),), tests={test: {"lora": own["lora"]} for test, own in tests.items()})
    assert "Where a mark lies" in _Page(render(alone)).text and "Against LORA" not in _Page(render(alone)).text


def _headline(**differences: Comparison) -> str:
    results = (_result("lora", 0.5), _result("a3tune", 0.6, differences), _result("other", 0.1))
    return headline(_data(results=results, shown="a3tune"))


UP, DOWN, OPEN = Comparison(_estimate(0.05)), Comparison(_estimate(-0.05)), Comparison(_estimate(0.01))
AGAINST = "A3TUNE against LORA, on the same 2,000 questions (synthetic scans): "


def test_the_first_sentence_says_what_got_better_and_worse_by_how_much_and_how_sure() -> None:
    assert _headline(open_recall=UP, hallucination=DOWN, coverage=DOWN, intensity=OPEN, pointing=OPEN) == (
        f"{AGAINST}better in words of the right answer that are said (60.0 instead of 50.0 %; 95 % interval +3.0 to "
        "+7.0 points), also in hallucination; worse in part of the right region that is looked at (60.0 instead of "
        "50.0 %; 95 % interval -7.0 to -3.0 points); in 2 other measures nothing that could not be chance."
    ).replace("-", "\N{MINUS SIGN}")
    assert _headline(patch_auroc=UP).endswith(
        "better in patch AUROC (0.600 instead of 0.500; 95 % interval +0.030 to +0.070); nothing got worse for sure."
    )


def test_the_first_sentence_hides_nothing_and_claims_nothing() -> None:
    nothing = f"{AGAINST}none of the 2 measures shows a difference that could not be chance."
    assert _headline(open_recall=OPEN, coverage=Comparison(_estimate(0.05), p=0.2)) == nothing
    assert _headline(open_recall=OPEN).endswith("the one measure does not show a difference that could not be chance.")
    worse = _headline(**dict.fromkeys(("open_recall", "closed_accuracy", "coverage", "intensity", "pointing"), DOWN))
    assert "better in" not in worse
    assert worse.endswith("also in closed accuracy, coverage, intensity and pointing; nothing got better for sure.")
    assert _headline() == _headline(open_recall=Comparison(Estimate(NAN, NAN, NAN, 0)))
    assert _headline() == "A3TUNE answered 2,000 questions (synthetic scans)."
    page = _Page(render(_data())).text
    assert page.index("could not be chance") < page.index("One training run per method says little")
    assert page.index("says little") < page.index("Dots are means") < page.index("Open recall", page.index("Dots are"))


def test_no_column_is_the_same_in_every_row() -> None:
    def result(name: str, recall: float) -> RunResult:
        return RunResult(name, name, {"open_recall": _estimate(recall), "hallucination": _estimate(0.0, 0.0)})

    text = render(_data(results=(result("lora", 0.4), result("a3tune", 0.5))))
    assert list(_tables(text)[0]["lora"]) == ["Open recall"]
    assert "The same for all: Hallucination, %: 0.0 [0.0, 0.0]." in _Page(text).text
    (one,) = (_tables(render(_data(results=(result("lora", 0.4),))))[0],)
    assert list(one["lora"]) == ["Open recall", "Hallucination"]  # of a single run nothing is the same


def test_a_kind_of_metrics_has_a_table_of_its_own() -> None:
    columns = [list(next(iter(table.values()))) for table in _tables(render(_data()))[:6]]
    assert max(map(len, columns)) <= 7
    assert columns[0][:2] == ["Open recall", "Closed accuracy"] and ["Coverage", "Intensity"] in [
        c[:2] for c in columns
    ]


@pytest.mark.parametrize(
    ("comparison", "wanted"),
    [
        (Comparison(_estimate(0.05)), "significantly higher in open recall"),
        (Comparison(_estimate(-0.05), p=0.01), "significantly lower in open recall"),
        (Comparison(_estimate(0.05), p=0.2), "no significant difference from LORA in open recall"),
        (Comparison(_estimate(0.02)), "no significant difference from LORA in open recall"),
        (Comparison(Estimate(0.3, NAN, NAN, 1)), "no significant difference from LORA in open recall"),
    ],
)
def test_significance(comparison: Comparison, wanted: str) -> None:
    results = (_result("lora", 0.5), _result("a3tune", 0.6, {"open_recall": comparison}))
    assert wanted in " ".join(summary(_data(results=results, seeds=3)))
    (change,) = _tables(render(_data(results=results)))[1].values()
    tone = "same" if "no " in wanted else "good" if "higher" in wanted else "bad"
    assert change["Open recall"].startswith(f"{tone}: ")


def test_sections_without_data_are_left_out() -> None:
    bare = RunResult("lora", "LoRA", {"open_recall": Estimate(NAN, NAN, NAN, 0)})
    data = _data(
        results=(bare,), question_only=None, labels=None, cases=None, notes=(), environment={}, synthetic=False
    )
    text = render(data)
    _Page(text)
    assert not re.search(r'id="(breakdown|curves|labels|cases|inside|baseline)"', text)
    assert "synthetic" not in text and "nan" not in _Page(text).text


def test_nothing_of_the_machine_reaches_the_page() -> None:
    secret = Path("/home/jane.doe/ward-7")
    config = RunConfig(
        data=DataConfig(secret / "a", secret / "b", secret / "c"),
        labels=LabelsConfig(store=secret / "d", ranker=str(secret / "ranker")),
        output=secret / "e",
    )
    settings = public_settings(config)
    assert settings["labels.ranker"] == "ranker" and settings["labels.top_k"] == "4"
    command = f"a3tune report {secret}/runs/lora --out={secret}/page.html data.train='{secret}/x y.jsonl'"
    text = render(_data(settings=settings, command=command))
    assert "jane.doe" not in text and "ward-7" not in text and "…/page.html" in text
    assert public_command("a3tune demo training.seed=1 --quick") == "a3tune demo training.seed=1 --quick"


@pytest.mark.parametrize(
    ("value", "metric", "signed", "wanted"),
    [
        (0.1234, "open_recall", False, "12.3"),
        (-0.1234, "open_recall", True, "\N{MINUS SIGN}12.3"),
        (0.1234, "intensity", True, "+0.123"),
        (-0.00001, "intensity", True, "0.000"),
        (0.00001, "open_recall", True, "0.0"),
        (NAN, "coverage", False, "\N{EN DASH}"),
    ],
)
def test_number(value: float, metric: str, signed: bool, wanted: str) -> None:
    assert number(value, metric, signed=signed) == wanted


def test_log_becomes_curves_and_expert_use() -> None:
    lines = [
        {"step": 10, "loss_llm": 2.0, "query_use": [0.5, 0.5], "query_entropy": 0.69},
        {"step": 20, "loss_llm": 1.0, "loss_align": None, "query_use": [0.9, 0.1], "query_entropy": 0.3},
        {"train_runtime": 5.0},
    ]
    curves = curves_from_log(lines)
    assert list(curves) == ["loss_llm"] and curves["loss_llm"].steps.tolist() == [10, 20]
    assert experts_from_log(lines) == {"query": ExpertUse((0.9, 0.1), 0.3)}


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(3.14, "3.1 s"), (48, "48 s"), (59.7, "1 min 00 s"), (365, "6 min 05 s"), (7400, "2 h 03 min")],
)
def test_duration(seconds: float, wanted: str) -> None:
    assert duration(seconds) == wanted


def test_heads_come_from_the_log():
    lines = [{"heads_selected": ["10", "01"]}, {"heads_selected": ["10", "10"]}, {"loss": 1.0}]
    found = heads_from_log(lines)
    assert found is not None and found.tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert heads_from_log([{"loss": 1.0}]) is None


def test_where_lower_is_better_a_fall_is_good():
    fell = Comparison(Estimate(-0.2, -0.3, -0.1, 9), 0.01)
    names = ("open_recall", "hallucination")
    high, low = ({name: Estimate(mean, mean, mean, 9) for name in names} for mean in (0.4, 0.2))
    results = (RunResult("lora", "LoRA", high), RunResult("a3tune", "A3Tune", low, dict.fromkeys(names, fell)))
    scores, differences = _tables(render(_data(results=results)))[:2]
    assert scores == {
        "LoRA": {"Open recall": "40.0 best [40.0, 40.0]", "Hallucination": "40.0 second [40.0, 40.0]"},
        "A3Tune": {"Open recall": "20.0 second [20.0, 20.0]", "Hallucination": "20.0 best [20.0, 20.0]"},
    }
    change = "▼-20.0 significantly lower [-30.0, -10.0] p = .010".replace("-", "\N{MINUS SIGN}")
    assert differences == {"A3Tune": {"Open recall": f"bad: {change}", "Hallucination": f"good: {change}"}}


def test_an_interval_without_0_that_is_not_significant_says_why():
    results = (
        RunResult("lora", "LoRA", {"open_recall": _estimate(0.5)}),
        RunResult(
            "a3tune", "A3Tune", {"open_recall": _estimate(0.55)}, {"open_recall": Comparison(_estimate(0.05), 0.2)}
        ),
    )
    text = render(_data(results=results))
    assert _tables(text)[1]["A3Tune"]["Open recall"] == "same: =+5.0 no significant difference [3.0, 7.0] p = .200"
    assert "also where the interval leaves out 0 but the adjusted p does not reach .05" in text
    assert "interval of this difference alone" in text


def test_a_margin_without_an_interval_has_no_empty_brackets():
    alone = reliance_of(0.5, 0.1) | {"reliance_margin": Estimate(0.4, NAN, NAN, 1)}
    text = _Page(render(_data(results=(RunResult("lora", "LoRA", alone),)))).text
    assert "The difference of 40.0 no interval says: nothing that could not be chance." in text


def test_means_that_are_shown_alike_share_their_rank_as_in_the_other_formats():
    means = {"a": 0.70004, "b": 0.69996, "c": 0.6}
    results = tuple(
        RunResult(name, name, {"open_recall": Estimate(mean, mean, mean, 9)}) for name, mean in means.items()
    )
    scores = _tables(render(_data(results=results, reference="a")))[0]
    assert [row["Open recall"].split()[:2] for row in scores.values()] == [
        ["70.0", "best"],
        ["70.0", "best"],
        ["60.0", "second"],
    ]
    assert written([comparison_table(results, "a")], ".md").count("**70.0**") == 2


def test_further_scores_are_folded_and_explained():
    scores = {
        "open_recall": _estimate(0.5),
        "open_recall_clipped": _estimate(0.4),
        "intensity_all_heads": _estimate(0.3),
    }
    text = render(_data(results=(RunResult("lora", "LoRA", scores),)))
    assert list(_tables(text)[0]["LoRA"]) == ["Open recall"]
    further = _tables(text.partition("<details")[2])[0]
    assert further["Open recall (clipped)"] == {"LoRA": "40.0 [38.0, 42.0]"}
    assert further["Intensity (all heads)"] == {"LoRA": "0.300 [0.280, 0.320]"}
    assert "no word counts more often" in text and "Of the map over all heads" in text


def reliance_of(inside: float, elsewhere: float | None, half: float = 0.02) -> dict[str, Estimate]:
    scores = {"reliance_inside": _estimate(inside), "reliance_outside": _estimate(0.6)}
    scores |= {"accuracy_intact": _estimate(0.7), "accuracy_inside_hidden": _estimate(0.4)}
    if elsewhere is not None:
        scores |= {"reliance_elsewhere": _estimate(elsewhere), "reliance_margin": _estimate(inside - elsewhere, half)}
    return scores


def test_what_answers_rest_on_is_told_against_the_control() -> None:
    curve: dict[Literal["attention", "random"], Curve] = {
        "attention": Curve(np.array([0, 50, 100]), np.array([-0.1, -2.0, -3.0]))
    }
    curve["random"] = Curve(np.array([0, 50, 100]), np.array([-0.1, -1.0, -3.0]))
    results = (
        RunResult("base", "Base", {"open_recall": _estimate(0.2)}),
        RunResult("lora", "LoRA", reliance_of(0.3, 0.29), deletion=curve),
        RunResult("a3tune", "A3Tune", reliance_of(0.5, 0.1)),
        RunResult("odd", "Odd", reliance_of(0.1, 0.5)),
        RunResult("large", "Large", reliance_of(0.5, None)),
    )
    page = _Page(render(_data(results=results)))
    said = page.text.partition("What answers rest on")[2]
    assert "A3Tune: hiding the region changes 50.0 % of the answers, hiding as much elsewhere 10.0 %." in said
    assert "The difference of 40.0 [38.0, 42.0] says: the answers rest on the regions" in said
    assert "The difference of 1.0 [\N{MINUS SIGN}1.0, 3.0] says: nothing that could not be chance." in said
    assert "says: the answers rest on other places" in said and "so that there is no control. Hiding all but" in said
    tables = _tables(render(_data(results=results)))
    table = next(table for table in tables if "Accuracy, region hidden, %" in next(iter(table.values())))
    assert set(table) == {"LoRA", "A3Tune", "Odd", "Large"}  # the base was not asked
    assert table["A3Tune"]["Accuracy, region hidden, %"] == "40.0 [38.0, 42.0]" and "Questions" not in table["LoRA"]
    assert "120 questions each" in said
    spoken = [attributes.get("aria-label") or "" for tag, attributes in page.tags if tag == "svg"]
    assert any("region hidden: LoRA 30.0 %, A3Tune 50.0 %" in label for label in spoken)
    assert any("hidden by attention -2.00 and at random -1.00" in label for label in spoken)
    assert "compare what hiding the region does with what hiding as much elsewhere does" in page.text
    assert "What answers rest on" not in render(_data(results=results[:1], reference="base"))
