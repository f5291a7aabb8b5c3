from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.errors import ConfigError, DataError, ModelError
from a3tune.metrics.catalogue import METRICS, Metric
from a3tune.metrics.radiology import NO_REPORT, clean, radiology_scores, weight_names

SAID = ["Assistant: The heart is normal.", "", "Легкие чистые, сердце в норме.", "word " * 20_000]
TRUTH = ["The heart is normal.", "No report was generated.", "The lungs are clear.", "word " * 20_000]


NAMES = ["bleu", "rouge_l", "meteor", "bertscore", "chexbert", "radgraph", "ratescore"]


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable], None]:
    """Puts another function in the place of what computes a metric."""

    def put(name: str, function: Callable) -> None:
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], compute=function))

    return put


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


def test_what_is_absent_is_told_and_the_rest_runs(compute):
    def lacking(predictions, references, folder):
        raise ModelError("get it there")

    for name in NAMES:
        if name != "rouge_l":
            compute(name, lacking)
    found = radiology_scores(SAID, TRUTH)
    assert set(found.values) == {"rouge_l"}
    # "No report generated." against "No report was generated.": 2 * 3 / (3 + 4).
    assert found.values["rouge_l"] == pytest.approx((1.0, 6 / 7, 0.0, 1.0))
    assert found.absent == {name: "get it there" for name in NAMES if name != "rouge_l"}


def test_each_metric_gets_its_folder_and_clean_predictions(compute):
    seen = {}

    def spy(name):
        def metric(predictions, references, folder):
            seen[name] = (list(predictions), list(references), folder)
            return {name: [0.5], f"{name}_also": [1.0]}

        return metric

    for name in NAMES:
        compute(name, spy(name))
    weights = {key: Path(key) for key in weight_names()}
    found = radiology_scores(["Assistant: normal"], ["normal"], weights, metrics=["meteor", "radgraph"])
    assert found.absent == {}
    assert found.values == {"meteor": (0.5,), "meteor_also": (1.0,), "radgraph": (0.5,), "radgraph_also": (1.0,)}
    assert seen == {
        "meteor": ([NO_REPORT], ["normal"], Path("nltk_data")),
        "radgraph": ([NO_REPORT], ["normal"], Path("radgraph")),
    }


def test_a_metric_of_ones_own_is_computed_with_the_others(monkeypatch, tmp_path):
    def words(said, truth, folder):
        return {"words": [float(folder == tmp_path)] * len(said)}

    monkeypatch.setitem(METRICS, "words", Metric("Words", "Is the folder there?", words, kind="radiology"))
    found = radiology_scores(SAID, TRUTH, {"words": tmp_path})
    assert found.values["words"] == (1.0,) * len(SAID)
    assert "rouge_l" in found.values


def test_nothing_was_given(tmp_path):
    found = radiology_scores(SAID, TRUTH, metrics=[name for name in NAMES if name not in ("bleu", "meteor")])
    assert set(found.values) == {"rouge_l"}
    assert all("no folder was given" in why and "FOLDER" in why for why in found.absent.values())
    assert set(found.absent) == {"bertscore", "chexbert", "radgraph", "ratescore"}
    assert radiology_scores([], [], metrics=["rouge_l"]).values == {"rouge_l": ()}


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"metric: expected bleu, .*, got rouge, cider"):
        radiology_scores(SAID, TRUTH, metrics=["bleu", "rouge", "cider"])
    with pytest.raises(ConfigError, match=r"weights: expected nltk_data, bertscore, .*, got bert"):
        radiology_scores(SAID, TRUTH, {"bert": Path()})
    with pytest.raises(DataError, match="4 references, got 3"):
        radiology_scores(SAID[1:], TRUTH)
