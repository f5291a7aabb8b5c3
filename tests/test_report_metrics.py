from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.metrics.reports import METRICS, NO_REPORT, clean, report_scores, weight_names

SAID = ["Assistant: The heart is normal.", "", "Легкие чистые, сердце в норме.", "word " * 20_000]
TRUTH = ["The heart is normal.", "No report was generated.", "The lungs are clear.", "word " * 20_000]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Assistant: The heart is normal.", "The heart is normal."),
        ("  Assistant:The heart is normal.\n", "The heart is normal."),
        ("Assistant: Assistant: normal", "Assistant: normal"),
        # Characters of the prefix are no prefix.
        ("nasal tissue is normal", "nasal tissue is normal"),
        ("The assistant: normal", "The assistant: normal"),
        ("Normal.", NO_REPORT),
        ("Assistant: Normal.", NO_REPORT),
        ("123456789", NO_REPORT),
        ("1234567890", "1234567890"),
        ("", NO_REPORT),
    ],
)
def test_clean(prediction, expected):
    assert clean(prediction) == expected


@given(st.text())
def test_clean_leaves_a_report(text):
    assert len(clean(text)) >= 10
    assert clean(text) in text or clean(text) == NO_REPORT


def test_what_is_absent_is_told_and_the_rest_runs(monkeypatch):
    def lacking(predictions, references, folder):
        raise ModelError("get it there")

    for name in METRICS:
        if name != "rouge_l":
            monkeypatch.setitem(METRICS, name, lacking)  # pyright: ignore[reportArgumentType]
    found = report_scores(SAID, TRUTH)
    assert set(found.values) == {"rouge_l"}
    # "No report generated." against "No report was generated.": 2 * 3 / (3 + 4).
    assert found.values["rouge_l"] == pytest.approx((1.0, 6 / 7, 0.0, 1.0))
    assert found.absent == {name: "get it there" for name in METRICS if name != "rouge_l"}


def test_each_metric_gets_its_folder_and_clean_predictions(monkeypatch):
    seen = {}

    def spy(name):
        def metric(predictions, references, folder):
            seen[name] = (list(predictions), list(references), folder)
            return {name: [0.5], f"{name}_also": [1.0]}

        return metric

    for name in METRICS:
        monkeypatch.setitem(METRICS, name, spy(name))  # pyright: ignore[reportArgumentType]
    weights = {key: Path(key) for key in weight_names()}
    found = report_scores(["Assistant: normal"], ["normal"], weights, metrics=["meteor", "radgraph"])
    assert found.absent == {}
    assert found.values == {"meteor": (0.5,), "meteor_also": (1.0,), "radgraph": (0.5,), "radgraph_also": (1.0,)}
    assert seen == {
        "meteor": ([NO_REPORT], ["normal"], Path("nltk_data")),
        "radgraph": ([NO_REPORT], ["normal"], Path("radgraph")),
    }


def test_a_metric_of_ones_own_is_computed_with_the_others(monkeypatch, tmp_path):
    monkeypatch.setitem(
        METRICS, "words", lambda said, truth, folder: {"words": [float(folder == tmp_path)] * len(said)}
    )
    found = report_scores(SAID, TRUTH, {"words": tmp_path})
    assert found.values["words"] == (1.0,) * len(SAID)
    assert "rouge_l" in found.values


def test_nothing_was_given(tmp_path):
    found = report_scores(SAID, TRUTH, metrics=[name for name in METRICS if name not in ("bleu", "meteor")])
    assert set(found.values) == {"rouge_l"}
    assert all("no folder was given" in why and "FOLDER" in why for why in found.absent.values())
    assert set(found.absent) == {"bertscore", "chexbert", "radgraph", "ratescore"}
    assert report_scores([], [], metrics=["rouge_l"]).values == {"rouge_l": ()}


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"metric: expected bleu, .*, got rouge, cider"):
        report_scores(SAID, TRUTH, metrics=["bleu", "rouge", "cider"])
    with pytest.raises(ConfigError, match=r"weights: expected nltk_data, bertscore, .*, got bert"):
        report_scores(SAID, TRUTH, {"bert": Path()})
    with pytest.raises(DataError, match="4 references, got 3"):
        report_scores(SAID[1:], TRUTH)
