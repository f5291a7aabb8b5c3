"""The page: honest sentences, escaped text, nothing from outside, nothing private."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from a3tune.config import DataConfig, LabelsConfig, RunConfig
from a3tune.config.public import public_settings
from a3tune.metrics.stats import Estimate
from a3tune.report.html import _difference, _ranks, duration, render
from a3tune.report.records import (
    METRICS,
    Case,
    Cases,
    Comparison,
    Curve,
    ExpertUse,
    LabelQuality,
    LabelScores,
    MethodResult,
    ReportData,
    View,
    curves_from_log,
    experts_from_log,
    heads_from_log,
    public_command,
)
from a3tune.report.summary import number, summary

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


def _estimate(mean: float, half: float = 0.02) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 120)


def _method(name: str, level: float, differences: dict[str, Comparison] | None = None, text: str = "") -> MethodResult:
    return MethodResult(
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
    better = {"open_recall": Comparison(_estimate(0.05)), "closed_accuracy": Comparison(_estimate(0.01))}
    data = ReportData(
        title=text or "A title",
        methods=tuple(_method(*of, text=text) for of in (("base", 0.3), ("lora", 0.5), ("a3tune", 0.6, better))),
        reference="lora",
        counts={text or "questions": 2000},
        seeds=1,
        command=text or "a3tune demo",
        settings={text or "labels.top_k": text or "4"},
        seconds={text or "train": 61.0},
        tau=0.15,
        normalisation="max",
        question_only=MethodResult("q", text or "Question only", {"open_recall": _estimate(0.2)}),
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
    assert tables == 4 == sum(tag == "caption" for tag, _ in page.tags)
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
    ranks = re.findall(r'class="(best|second)? ?"><span class="figure-cell"><span class="value">(\d+\.\d)', text)
    assert ranks[:7:7] == [("", "30.0")]
    assert ("best", "60.0") in ranks and ("second", "50.0") in ranks and ("best", "50.0") not in ranks


def test_summary_says_what_is_and_what_is_not_significant() -> None:
    text = " ".join(summary(_data()))
    assert "A3TUNE is significantly higher in open recall (60.0 against 50.0 %)" in text
    assert "no significant difference in closed accuracy" in text
    assert "One training run per method says little" in text and "2,000 questions" in text
    assert "BASE is" not in text


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
    methods = (_method("lora", 0.5), _method("a3tune", 0.6, {"open_recall": comparison}))
    assert wanted in " ".join(summary(_data(methods=methods, seeds=3)))
    tone = re.search(r'class=" (good|bad|same)"', render(_data(methods=methods)))
    assert tone and tone[1] == ("same" if "no " in wanted else "good" if "higher" in wanted else "bad")


def test_sections_without_data_are_left_out() -> None:
    bare = MethodResult("lora", "LoRA", {"open_recall": Estimate(NAN, NAN, NAN, 0)})
    data = _data(
        methods=(bare,), question_only=None, labels=None, cases=None, notes=(), environment={}, synthetic=False
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
    assert (_difference(fell, "hallucination").mark, _difference(fell, "hallucination").tone) == ("down", "good")
    assert (_difference(fell, "open_recall").mark, _difference(fell, "open_recall").tone) == ("down", "bad")
    high, low = (Estimate(mean, mean, mean, 9) for mean in (0.4, 0.2))
    assert _ranks([high, low], lower_is_better=True) == ["second", "best"]
    assert _ranks([high, low]) == ["best", "second"]
