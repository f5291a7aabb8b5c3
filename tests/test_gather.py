from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from a3tune.errors import RunError
from a3tune.evaluation.results import make_prediction
from a3tune.labels.quality import Quality
from a3tune.masks import encode_mask
from a3tune.report.case_views import draw_cases
from a3tune.report.cases import Choice, Selection
from a3tune.report.gather import EvaluatedRun, label_scores, question_only, read_run, run_results
from a3tune.run.folder import RunFolder
from a3tune.types import Labels, Region, Sample, Segment
from orientations import UPRIGHT, oriented

SIZE = 8


def mask(rows: slice, columns: slice) -> np.ndarray:
    found = np.zeros((SIZE, SIZE), dtype=bool)
    found[rows, columns] = True
    return found


LEFT, TOP = mask(slice(None), slice(0, 4)), mask(slice(0, 4), slice(None))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Twenty questions, open and closed in turn, about twenty images; the region is the left half."""
    found = []
    for index in range(20):
        path = tmp_path / f"{index}.png"
        Image.new("L", (SIZE, SIZE), index).save(path)
        answer, kind = ("liver", "open") if index % 2 else ("yes", "closed")
        region = Region(mask=encode_mask(LEFT))
        found.append(Sample(str(index), path, "?", answer, kind, (region,), {"question_type": kind, "body": "chest"}))
    return found


def evaluated(name: str, samples: list[Sample], right: bool, mass: float) -> EvaluatedRun:
    predictions = tuple(
        make_prediction(sample, sample.answer if right else "no idea", {"attention_mass": mass}) for sample in samples
    )
    maps = {sample.id: np.array([1, 0, 0.5, 0], dtype=np.float16) for sample in samples}
    return EvaluatedRun(name, name.title(), predictions, maps, ())


def test_differences_are_against_the_reference_on_the_same_questions(samples):
    runs = [evaluated("base", samples, False, 0.1), evaluated("ours", samples, True, 0.4)]
    base, ours = run_results(runs, samples, "base")
    assert base.differences == {}
    assert base.scores["open_recall"].mean == 0
    assert ours.scores["open_recall"].mean == ours.scores["closed_accuracy"].mean == 1
    assert set(ours.differences) == {"open_recall", "closed_accuracy", "attention_mass"}
    assert ours.differences["attention_mass"].difference.mean == pytest.approx(0.3)
    assert all(comparison.significant for comparison in ours.differences.values())
    types = ours.breakdown["question_type"]
    assert {name: {metric: found.mean for metric, found in metrics.items()} for name, metrics in types.items()} == {
        "open": {"open_recall": 1},
        "closed": {"closed_accuracy": 1},
    }
    assert set(ours.breakdown) == {"question_type", "body"}
    assert set(ours.breakdown["body"]["chest"]) == {"open_recall", "closed_accuracy"}


def test_p_values_are_adjusted_over_all_comparisons(samples):
    ours, other = evaluated("ours", samples, True, 0.4), evaluated("other", samples, True, 0.1)
    base = evaluated("base", samples, False, 0.1)
    alone = run_results([base, ours], samples, "base")[1]
    among = run_results([base, ours, other], samples, "base")[1]
    assert among.differences["open_recall"].p > alone.differences["open_recall"].p


def test_question_only_answers_with_the_most_frequent_training_answer(samples):
    found = question_only(samples, samples)
    assert found.scores["closed_accuracy"].mean == 1
    assert "attention_mass" not in found.scores


def test_a_case_shows_regions_labels_and_attention_on_the_pixels(samples):
    labels = {"3": Labels("3", (Segment(encode_mask(TOP)),), (0.9,))}
    boxes = np.array([[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8]], dtype=float)
    chosen = Selection((Choice("3", "random"), Choice("4", "random")), "the rule")
    cases = draw_cases(chosen, [evaluated("ours", samples, True, 0.4)], samples, labels, lambda height, width: boxes)
    case, unlabelled = cases.cases
    assert cases.rule == "the rule"
    assert (case.region == LEFT).all()
    assert [(label == TOP).all() for label in case.labels] == [True]
    assert unlabelled.labels == ()
    assert case.image[0, 0, 0] == 3
    (view,) = case.views
    assert (view.answer, view.right, view.mass) == ("liver", 1.0, 0.4)
    assert view.heat[0, 0] == 1
    assert view.heat[0, 7] == 0
    assert view.heat[7, 0] == 0.5


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_case_is_drawn_upright_under_its_region(samples, tmp_path: Path, orientation: int):
    stored = np.arange(6 * SIZE, dtype=np.uint8).reshape(6, SIZE)
    upright = UPRIGHT[orientation](stored)
    marked = np.zeros(upright.shape, dtype=bool)
    marked[:2] = True  # the region is one of the image as it is seen
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=oriented(orientation))
    turned = replace(samples[0], image=tmp_path / "turned.png", regions=(Region(mask=encode_mask(marked)),))
    sizes = []

    def boxes(height: int, width: int) -> np.ndarray:
        sizes.append((height, width))
        return np.array([[0, 0, width, 2], [0, 2, width, height]], dtype=float)

    run = replace(evaluated("ours", [turned], True, 0.4), maps={turned.id: np.array([1, 0], dtype=np.float16)})
    (case,) = draw_cases(Selection((Choice(turned.id, "random"),), "rule"), [run], [turned], {}, boxes).cases
    assert sizes == [upright.shape]
    np.testing.assert_array_equal(case.image[..., 0], upright)
    assert (case.region == marked).all() and ((case.views[0].heat > 0) == marked).all()


def test_label_quality_by_body():
    all_of_it, chest = Quality(8, 0.5, 0.4, 0.9, 0.8, 0.3), Quality(4, 0.25, 0.2, 0.9, 0.8, 0.3)
    found = label_scores({"all": all_of_it, "body=chest": chest}, top_k=4, min_iou=0.5)
    assert found is not None
    assert (found.overall.recall_at_k, found.overall.mean_best_iou, found.overall.ceiling) == (0.5, 0.4, 0.9)
    assert found.by_body["chest"].count == 4
    assert label_scores({}, top_k=4, min_iou=0.5) is None


def test_a_run_on_other_questions_cannot_be_compared(samples, tmp_path: Path):
    folder = RunFolder.create(tmp_path / "run")
    with pytest.raises(RunError, match="evaluate first"):
        read_run("run", "Run", folder, samples)
    folder.write_text(
        "predictions.jsonl",
        '{"id": "0", "prompt": "?", "answer": "yes", "answer_type": "closed", "prediction": "no", "cost": {}}\n',
    )
    with pytest.raises(RunError, match="to the 20 test questions; 19 of them are not answered, and 0 answers"):
        read_run("run", "Run", folder, samples)
    with pytest.raises(
        RunError, match="to the 1 test questions; 1 of them are not answered, and 1 answers are to other"
    ):
        read_run("run", "Run", folder, samples[1:2])
    (found,) = read_run("run", "Run", folder, samples[:1]).predictions
    assert found.prediction == "no"
    folder.write_text("metrics.jsonl", "{\n")
    with pytest.raises(RunError, match="one JSON object per line"):
        read_run("run", "Run", folder, samples[:1])
