"""Marks on phantom scans: what they look like, and that a data set's marks name the answers that it says they do."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from a3tune.data.phantom import make_scan, write_phantom
from a3tune.data.phantom.dataset import MARK_TESTS
from a3tune.data.phantom.marks import CODES, KIND_OF_BODY, Mark, MarkKind, draw_mark
from a3tune.data.phantom.questions import ANSWERS, ORGAN_TYPES
from a3tune.data.phantom.scan import SIZE
from a3tune.data.rows import read_rows
from a3tune.masks import decode_mask
from a3tune.types import Sample

SHARE = 0.5


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    files = write_phantom(tmp_path_factory.mktemp("marked"), {"train": 20, "test": 10}, seed=1, marks=SHARE)
    tests = read_rows(files["test"])
    assert {sample.meta["test"] for sample in tests} == set(MARK_TESTS)
    by_test = {test: [sample for sample in tests if sample.meta["test"] == test] for test in MARK_TESTS}
    return {"train": read_rows(files["train"]), **by_test}


def named(sample: Sample) -> str:
    """The answer that the sample's mark names."""
    names = [Mark(KIND_OF_BODY[sample.meta["body"]], code).name for code in range(4)]
    return ANSWERS[sample.meta["question_type"]][names.index(sample.meta["mark"])]


def pixels(sample: Sample) -> np.ndarray:
    assert isinstance(sample.image, Path)
    return np.asarray(Image.open(sample.image))


@pytest.mark.parametrize("kind", CODES)
def test_a_mark_is_seen_outside_lesions_only_and_its_place_varies(kind: MarkKind):
    scan = make_scan((0, 1))
    lesions = np.any([lesion.mask for lesion in scan.lesions], axis=0)
    drawn = []
    for code in range(4):
        for seed in range(20):
            picture = draw_mark(scan, Mark(kind, code), np.random.default_rng(seed))
            assert picture.shape == (SIZE, SIZE) and picture.dtype == np.uint8
            assert np.array_equal(picture[lesions], scan.image[lesions])
            assert 20 < (picture != scan.image).sum() < 1100
            drawn.append(picture.tobytes())
    assert len(set(drawn)) > 20


@pytest.mark.parametrize("kind", ["tag", "tube"])
def test_tags_and_tubes_differ_by_their_corner(kind: MarkKind):
    scan = make_scan((0, 1))
    for code, name in enumerate(CODES[kind]):
        y, x = np.nonzero(draw_mark(scan, Mark(kind, code), np.random.default_rng(3)) != scan.image)
        assert (y.mean() < SIZE / 2, x.mean() < SIZE / 2) == ("upper" in name, "left" in name)


def test_training_marks_name_the_answer_as_often_as_asked(rows):
    train = rows["train"]
    agreeing = [sample.meta["mark_agrees"] == "yes" for sample in train]
    assert agreeing == [named(sample) == sample.answer for sample in train]
    assert abs(np.mean(agreeing) - SHARE) < 0.2
    assert len({sample.image for sample in train}) == len(train), "one question for each scan"
    assert all(sample.meta["mark"].startswith(KIND_OF_BODY[sample.meta["body"]]) for sample in train)


def test_tests_are_the_same_scans_and_questions_with_other_marks(rows):
    assert "test" not in rows["train"][0].meta
    for samples in zip(*(rows[test] for test in MARK_TESTS), strict=True):
        disagree, either, none, agree = samples
        assert len({(s.id.rpartition("-")[0], s.prompt, s.answer, s.regions) for s in samples}) == 1
        assert named(agree) == agree.answer and named(disagree) != disagree.answer
        assert none.meta["mark"] == "none" and "mark_agrees" not in none.meta
        assert either.image in (agree.image, disagree.image)
        assert (pixels(agree) != pixels(none)).any() and (pixels(agree) != pixels(disagree)).any()
        assert agree.regions and agree.regions[0].mask and decode_mask(agree.regions[0].mask).any()


def test_random_marks_name_the_right_answer_as_often_as_chance(rows):
    samples = rows["random"]
    expected = np.mean([1 / len(ANSWERS[sample.meta["question_type"]]) for sample in samples])
    assert abs(np.mean([sample.meta["mark_agrees"] == "yes" for sample in samples]) - expected) < 0.25


def test_marked_patients_are_disjoint_and_every_type_is_asked(rows):
    train, test = ({sample.meta["patient"] for sample in rows[name]} for name in ("train", "none"))
    assert not train & test
    assert set(Counter(sample.meta["question_type"] for sample in rows["train"])) == set(ORGAN_TYPES)


def test_all_training_marks_agree_when_asked(tmp_path):
    train = read_rows(write_phantom(tmp_path, {"train": 8}, marks=1.0)["train"])
    assert {sample.meta["mark_agrees"] for sample in train} == {"yes"}


@pytest.mark.parametrize("marks", [None, 1.0])
def test_questions_are_of_the_types_that_are_asked_for(tmp_path, marks):
    types = ["kind", "presence"]
    train = read_rows(write_phantom(tmp_path, {"train": 6}, marks=marks, types=types)["train"])
    assert {sample.meta["question_type"] for sample in train} == set(types)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"reports": True, "marks": 1.0}, "reports, or marks"),
        ({"reports": True, "types": ["kind"]}, "reports, or marks"),
        ({"marks": 95}, "95"),
    ],
)
def test_what_marks_cannot_mean_is_refused_before_anything_is_written(tmp_path, given, told):
    with pytest.raises(ValueError, match=told):
        write_phantom(tmp_path / "out", {"train": 1}, **given)
    assert not (tmp_path / "out").exists()
