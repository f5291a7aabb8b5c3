import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from a3tune.metrics.catalogue import METRICS, Metric, answer_scores
from a3tune.metrics.vqa import (
    choice_accuracy,
    closed_accuracy,
    normalise,
    open_recall,
    prior_baseline,
)
from a3tune.types import AnswerType, Sample

DATA = Path(os.environ.get("A3TUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The left lung.", "left lung"),
        ("X-ray", "x ray"),
        ("T2 - weighted", "t2 weighted"),
        ("well-known, X-ray", "well known x ray"),
        ("1,000 x-ray", "1000 xray"),  # a comma between digits drops every mark of the string
        ("none", "0"),
        ("Two lesions, one cyst", "2 lesions 1 cyst"),
        ("1.5 cm.", "1.5 cm"),
        ("a an the", ""),
        ("isnt couldnt've Im twas", "isn't couldn't've im 'twas"),
        ("", ""),
        ("." * 70, "......"),  # 32 dots at a time, twice
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_open_recall_by_hand():
    assert open_recall("left lung", "Left lung") == 1.0
    assert open_recall("the left kidney", "left lung") == 0.5
    assert open_recall("right kidney", "left lung") == 0.0
    assert open_recall("", "lung") == open_recall("lung", "") == open_recall("lung", "the") == 0.0
    # tp = 3 times "left", fn = 1 "lung": 3/4, where one of two words was found.
    assert open_recall("left left left", "left lung") == 0.75
    assert open_recall("left left left", "left lung", clipped=True) == 0.5
    # A word once found is never missed: the answer's second "left" does not count.
    assert open_recall("left", "left left") == 1.0
    assert open_recall("left", "left left", clipped=True) == 0.5


@pytest.mark.parametrize(
    ("prediction", "answer", "published", "strict"),
    [
        ("Yes.", "yes", 1, 1),
        ("No", "yes", 0, 0),
        ("yes", "no", 0, 0),
        ("The image is normal", "no", 1, 0),  # "normal" holds "no"
        ("the lung", "no", 0, 0),
        ("Yes, there is no effusion", "no", 1, 0),
        ("Yes, there is no effusion", "yes", 1, 1),
        ("left", "left", 0, 1),  # neither yes nor no
        ("the left side", "Left", 0, 1),
        ("leftmost", "left", 0, 0),
        ("nodule in the left lung", "left lung", 1, 1),
        ("", "yes", 0, 0),
        ("yes", "", 1, 0),
    ],
)
def test_closed_accuracy(prediction, answer, published, strict):
    assert closed_accuracy(prediction, answer) == published
    assert closed_accuracy(prediction, answer, "strict") == strict


def test_scores_of_each_type():
    assert answer_scores("left", "left lung", "open") == {"open_recall": 0.5, "open_recall_clipped": 0.5}
    assert answer_scores("Yes", "No.", "closed") == {
        "closed_accuracy": 0,
        "closed_accuracy_strict": 0,
        "hallucination": 1,
    }
    assert answer_scores("no", "no", "closed")["hallucination"] == 0
    assert answer_scores("left", "left", "closed") == {"closed_accuracy_strict": 1}
    assert "hallucination" not in answer_scores("yes", "yes", "closed")
    assert answer_scores("the CT", "CT", "choice") == {"choice_accuracy_strict": 1}
    found = answer_scores("It is a scan with X rays.", "X-ray", "choice", ["MRI", "X-ray"])
    assert found == {"choice_accuracy": 1, "choice_accuracy_strict": 0}
    assert answer_scores("a", "a", "report") == {}


@pytest.mark.parametrize(
    ("file", "answer_type", "closed", "counted"),
    [("slake_questions/test.json", "CLOSED", 416, 355), ("vqa_rad/testset.json", "CLOSED", 272, 254)],
)
def test_the_published_accuracies_are_shares_of_these_questions(file, answer_type, closed, counted):
    path = DATA / file
    if not path.is_file():
        pytest.skip("needs the published questions (A3TUNE_DATA)")
    rows = [row for row in json.loads(path.read_text(encoding="utf-8")) if row.get("q_lang", "en") == "en"]
    answers = [str(row["answer"]) for row in rows if row["answer_type"].strip() == answer_type]
    assert len(answers) == closed
    assert sum("closed_accuracy" in answer_scores("yes", answer, "closed") for answer in answers) == counted


def test_choice_is_the_most_similar_option():
    options = ["Magnetic resonance", "Computed tomography", "Ultrasound", "X-ray"]
    assert choice_accuracy("The image is a computed tomography scan.", "Computed tomography", options) == 1
    assert choice_accuracy("magnetic resonance imaging", "Computed tomography", options) == 0
    # Twice the letters in common through all letters: 4/5 with "ab", 2/4 with "c".
    assert choice_accuracy("abc", "ab", ["ab", "c"]) == 1
    assert choice_accuracy("abc", "c", ["ab", "c"]) == 0
    # Nothing in common with any: the last, as published.
    assert choice_accuracy("", "X-ray", options) == 1
    assert choice_accuracy("", "Ultrasound", options) == 0
    assert choice_accuracy("word " * 20_000, "X-ray", options) in (0, 1)
    with pytest.raises(ValueError, match="option"):
        choice_accuracy("a", "a", [])


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.data())
def test_an_option_is_most_similar_to_itself(options, data):
    answer = data.draw(st.sampled_from(options))
    assert choice_accuracy(answer, answer, options) == 1


@given(st.text(), st.text())
def test_scores_are_shares(prediction, answer):
    for score in (
        open_recall(prediction, answer),
        open_recall(prediction, answer, clipped=True),
        closed_accuracy(prediction, answer),
        closed_accuracy(prediction, answer, "strict"),
    ):
        assert 0 <= score <= 1


WORDS = st.lists(st.sampled_from(["left", "lung", "cyst", "liver", "small"]), min_size=1).map(" ".join)


@given(WORDS, WORDS)
def test_recall_finds_all_of_what_holds_the_answer(extra, answer):
    assert open_recall(f"{extra} {answer}", answer) == 1.0
    assert open_recall(f"{extra} {answer}", answer, clipped=True) == 1.0
    assert open_recall(extra, answer, clipped=True) <= open_recall(extra, answer)


def sample(prompt: str, answer: str, question_type: str | None = None, answer_type: AnswerType = "open") -> Sample:
    meta = {} if question_type is None else {"question_type": question_type}
    return Sample("", b"", prompt, answer, answer_type, meta=meta)


def test_prior_baseline_backs_off():
    train = [
        sample("Which organ?", "liver", "organ"),
        sample("Which organ?", "liver", "organ"),
        sample("Which organ?", "lung", "organ"),
        sample("Which large organ?", "lung", "organ"),
        sample("Which small organ?", "lung", "organ"),
        sample("What?", "cyst"),
        sample("Is it?", "yes", answer_type="closed"),
    ]
    test = [
        sample("Which organ?", "?", "organ"),
        sample("Which other organ?", "?", "organ"),
        sample("Which kind?", "?", "kind"),
        sample("Which organ?", "?", "organ", "closed"),
        sample("Write.", "?", None, "report"),
    ]
    # Prompt; then question type (lung 3, liver 2); then answer type, then all (lung 3, liver 2).
    assert prior_baseline(train, test) == ["liver", "lung", "lung", "yes", "lung"]
    with pytest.raises(ValueError, match="training sample"):
        prior_baseline([], test)


def test_a_score_of_ones_own_stands_beside_the_others(monkeypatch):
    def exact(prediction, answer, answer_type, options):
        return float(prediction == answer) if answer_type == "open" else None

    monkeypatch.setitem(METRICS, "exact", Metric("Exact", "The same text.", exact))
    assert answer_scores("left lung", "left lung", "open")["exact"] == 1.0
    assert answer_scores("lung", "left lung", "open").keys() == {"open_recall", "open_recall_clipped", "exact"}
    assert "exact" not in answer_scores("yes", "yes", "closed")
