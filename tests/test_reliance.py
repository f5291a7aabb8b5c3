"""What answers rest on, measured on a model of which it is known."""

import copy
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from a3tune.config import EvaluationConfig, LabelsConfig
from a3tune.errors import DataError, RunError
from a3tune.evaluation.evaluate import evaluate
from a3tune.evaluation.faithfulness import STEPS, deletion_curves
from a3tune.evaluation.predictions import read_predictions
from a3tune.evaluation.reliance_log import read_reliance
from a3tune.machine.digests import sealed, unsealed
from a3tune.metrics.reliance import Occluded, reliance_scores
from a3tune.metrics.stats import Estimate
from a3tune.report.records import RunResult
from a3tune.report.reliance import reliance
from a3tune.run.folder import RunFolder
from a3tune.types import Prediction, Region, Sample
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import Vlm
from constructed import PROMPT, SIDE, reader
from evaluations import stop_after

PATCH = 6
"""Second row, third column."""
HERE, THERE = (24.0, 12.0, 36.0, 24.0), (0.0, 24.0, 12.0, 36.0)
HIDE = EvaluationConfig(batch_size=2, max_new_tokens=3, heads=1, occlude=True)


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return reader(PATCH)


def scan(bright: bool) -> Image.Image:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[12:24, 24:36] = 255 if bright else 0
    return Image.fromarray(pixels)


def sample(name: str, box: tuple[float, float, float, float] | None, *, bright: bool = True) -> Sample:
    file = io.BytesIO()
    scan(bright).save(file, "PNG")
    regions = None if box is None else (Region(box=box),)
    return Sample(name, file.getvalue(), PROMPT, "yes" if bright else "no", "closed", regions, {"patient": name})


def test_the_constructed_model_is_what_it_says(vlm):
    found = evaluate(vlm, [sample("a", HERE), sample("b", HERE, bright=False)], replace(HIDE, occlude=False))
    assert [one.prediction for one in found.predictions] == ["yes", "no"]
    assert found.predictions[0].attention["attention_mass"] > 0.99
    assert found.predictions[0].reliance == {} and "with_reliance" not in found.counts


def test_what_is_hidden_decides_the_answer_where_the_model_reads(vlm):
    found = evaluate(vlm, [sample("a", HERE), sample("b", HERE)], HIDE)
    for name in ("reliance_inside", "reliance_margin", "accuracy_intact", "accuracy_outside_hidden"):
        assert found.metrics[name].mean == 1, name
    for name in ("reliance_outside", "reliance_elsewhere", "accuracy_inside_hidden"):
        assert found.metrics[name].mean == 0, name
    assert all(found.metrics[f"reliance_inside_{filling}"].mean == 1 for filling in HIDE.fillings)
    assert found.metrics["reliance_inside"].count == found.counts["with_reliance"] == 2


def test_a_region_that_the_model_does_not_read_carries_nothing(vlm):
    scores = evaluate(vlm, [sample("a", THERE)], HIDE).predictions[0].reliance
    assert (scores["reliance_inside"], scores["reliance_outside"]) == (0, 1)
    assert (scores["accuracy_inside_hidden"], scores["accuracy_outside_hidden"]) == (1, 0)


def test_the_answer_fades_at_once_where_attention_points_to_what_is_read(vlm):
    image = scan(True)
    answered = prepare(vlm, [image], PROMPT, "yes")
    right = np.zeros(16)
    right[PATCH] = 1
    for map_N, drop in ((right, 1), (1 - right, STEPS)):
        ((by_attention, at_random),) = deletion_curves(vlm, [answered], [map_N], [0])
        assert len(by_attention) == len(at_random) == STEPS + 1
        assert by_attention[0] > -0.01 and by_attention[0] == at_random[0] and by_attention[-1] == at_random[-1]
        fallen = [value < -1 for value in by_attention]
        assert fallen == [number >= drop for number in range(STEPS + 1)]
    scores = evaluate(vlm, [sample("a", HERE)], HIDE).predictions[0].reliance
    assert scores["deletion_attention"] > scores["deletion_random"] > 0
    assert scores["deletion_gain"] == pytest.approx(scores["deletion_attention"] - scores["deletion_random"])


def test_a_batch_changes_nothing_and_samples_without_a_region_ride_along(vlm):
    samples = [sample("a", HERE), sample("b", None), sample("c", THERE), sample("d", HERE, bright=False)]
    together, alone = evaluate(vlm, samples, HIDE), evaluate(vlm, samples, replace(HIDE, batch_size=1))
    assert together.counts["with_reliance"] == 3 and together.predictions[1].reliance == {}
    for one, other in zip(together.predictions, alone.predictions, strict=True):
        assert dict(one.reliance) == pytest.approx(dict(other.reliance), abs=1e-4)
    # A dark patch stays dark, whatever stands in its place.
    assert together.predictions[3].reliance["reliance_inside"] == 0


def test_stopped_it_goes_on_and_a_plain_evaluation_can_be_extended(vlm, tmp_path: Path):
    samples = [sample(name, HERE) for name in "abcd"]
    whole = evaluate(vlm, samples, HIDE)
    folder = RunFolder(tmp_path / "run")
    evaluate(vlm, samples, replace(HIDE, occlude=False), out_folder=folder.path)
    assert not folder.reliance.exists() and all(one.reliance == {} for one in read_predictions(folder))
    with pytest.raises(KeyboardInterrupt):
        evaluate(vlm, samples, HIDE, out_folder=folder.path, progress=stop_after(1))
    assert len(read_reliance(folder)[1]) == 2
    folder.reliance.write_bytes(folder.reliance.read_bytes()[:-20])  # killed while writing
    assert len(read_reliance(folder)[1]) == 1
    seen: list[tuple[int, int]] = []
    again = evaluate(vlm, samples, HIDE, out_folder=folder.path, progress=lambda *at: seen.append(at))
    assert seen == [(6, 8), (8, 8)]
    assert again.predictions == whole.predictions and again.metrics == whole.metrics
    assert tuple(read_predictions(folder)) == tuple(sorted(again.predictions, key=lambda one: one.id))
    assert folder.reliance.read_bytes().count(b"\n") == 1 + len(samples)
    assert json.loads(folder.results.read_text())["settings"]["occlusion"]["regions"] == "true"
    assert "reliance_inside" not in folder.predictions.read_text()
    # Evaluated again without it, what is known stays.
    plain = evaluate(vlm, samples, replace(HIDE, occlude=False), out_folder=folder.path)
    assert plain.metrics == again.metrics


def test_what_was_measured_otherwise_is_refused(vlm, tmp_path: Path):
    samples, folder = [sample("a", HERE)], RunFolder(tmp_path / "run")
    evaluate(vlm, samples, HIDE, out_folder=folder.path)
    before = folder.reliance.read_bytes()
    with pytest.raises(RunError, match=r'reliance.jsonl: was measured with fillings=\["mean", .*, not \["noise"\]'):
        evaluate(vlm, samples, replace(HIDE, fillings=("noise",)), out_folder=folder.path)
    with pytest.raises(RunError, match=r"dilation=0.02, not 0.1"):
        evaluate(vlm, samples, replace(HIDE, dilation=0.1), out_folder=folder.path)
    assert folder.reliance.read_bytes() == before
    answered = folder.predictions.read_bytes()
    folder.predictions.unlink()
    with pytest.raises(RunError, match=r"holds an evaluation with tau=0\.15, not 0\.5"):
        evaluate(vlm, samples, replace(HIDE, tau=0.5), out_folder=folder.path)
    with pytest.raises(RunError, match=r"holds an evaluation of other content: .*the regions of sample 'a'"):
        evaluate(vlm, [sample("a", THERE)], HIDE, out_folder=folder.path)
    assert folder.reliance.read_bytes() == before
    folder.predictions.write_bytes(answered)
    first, record = before.decode().splitlines()
    other = sealed(unsealed(json.loads(record)) | {"intact": "no"})
    folder.reliance.write_text(f"{first}\n{json.dumps(other)}\n")
    with pytest.raises(RunError, match="another answer to sample 'a'"):
        read_predictions(folder)
    head, _, rest = before.partition(b"\n")
    for line, damaged in ((2, before.replace(b'"intact"', b'"in')), (1, rest), (1, b""), (1, head[:-9] + b"\n" + rest)):
        folder.reliance.write_bytes(damaged)
        with pytest.raises(RunError, match=rf"reliance.jsonl:{line}: is damaged; remove the file"):
            read_predictions(folder)


def test_drawn_answers_are_compared_with_those_of_the_same_batches(vlm, tmp_path: Path):
    """Outside a region that is the whole image nothing is hidden: an answer that changes there was drawn otherwise."""
    samples, drawn = [sample(f"{n}", (0, 0, SIDE, SIDE)) for n in range(8)], replace(HIDE, strategy="multinomial")
    torch.manual_seed(0)
    with torch.no_grad():
        uncertain = replace(vlm, model=copy.deepcopy(vlm.model))
        uncertain.model.get_output_embeddings().weight.mul_(0.02)
    whole = evaluate(uncertain, samples, drawn, out_folder=tmp_path / "whole")
    assert len({one.prediction for one in whole.predictions}) > 1
    assert {one.reliance["reliance_outside"] for one in whole.predictions} == {0}
    evaluate(uncertain, samples, replace(drawn, occlude=False), out_folder=tmp_path / "later")
    assert evaluate(uncertain, samples, drawn, out_folder=tmp_path / "later").metrics == whole.metrics
    evaluate(uncertain, samples, replace(drawn, occlude=False), out_folder=tmp_path / "other")
    with pytest.raises(
        RunError, match="the multinomial strategy draws other random numbers in batches of another size"
    ):
        evaluate(uncertain, samples, replace(drawn, batch_size=3), out_folder=tmp_path / "other")


def test_weak_labels_stand_in_where_no_sample_has_a_region(vlm):
    found = evaluate(vlm, [sample("a", None)], HIDE, labels=LabelsConfig(top_k=1))
    occlusion = found.settings["occlusion"]
    assert occlusion["regions"] == "weak" and occlusion["top_k"] == 1
    assert 0 <= found.metrics["reliance_inside"].mean <= 1
    with pytest.raises(DataError, match="expected some to hide, got an empty list for all 1 questions"):
        evaluate(vlm, [replace(sample("a", None), regions=())], HIDE)


def test_scores_of_a_record():
    asked = Prediction("q", "Where?", "left lung", "open", "Left lung.")
    answers = {
        "inside": {"mean": "right", "noise": "the left lung"},
        "outside": {"mean": "left", "noise": "nothing"},
    }
    record = Occluded("q", "Left lung.", answers, (-1.0, -3.0, -3.0), (-1.0, -1.0, -3.0))  # pyright: ignore[reportArgumentType]
    scores = reliance_scores(asked, record)
    # Articles, case and punctuation do not make another answer.
    assert (scores["reliance_inside_mean"], scores["reliance_inside_noise"], scores["reliance_inside"]) == (1, 0, 0.5)
    assert scores["accuracy_intact"] == 1 and scores["accuracy_outside_hidden"] == 0.25
    assert scores["deletion_attention"] == pytest.approx(0.5 * 1 + 0.5 * 2)
    assert scores["deletion_gain"] == pytest.approx(1.5 - 0.5)
    assert "reliance_elsewhere" not in scores and "reliance_margin" not in scores
    report = reliance_scores(replace(asked, answer_type="report"), record)
    assert report["reliance_inside"] == 0.5 and not any(name.startswith("accuracy") for name in report)
    assert reliance_scores(asked, Occluded("q", "Left lung.")) == {}


def test_no_position_but_itself_sees_a_hidden_one():
    from a3tune.attention.hide import hide

    hidden = torch.tensor([[False, True, False, False]])
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    assert torch.equal(hide(None, hidden, 4, causal=True)[0, 0], expected)
    assert torch.equal(hide(None, hidden, 1, causal=False)[0, 0], torch.tensor([[True, False, True, True]]))
    everything = torch.ones(1, 1, 4, 4).bool()
    assert torch.equal(hide(everything.tril(), hidden, 4, causal=True)[0, 0], expected)
    additive = torch.zeros(1, 1, 4, 4).masked_fill(~everything.tril(), torch.finfo(torch.float32).min)
    assert torch.equal(hide(additive, hidden, 4, causal=True)[0, 0] == 0, expected)


def test_the_sentence_takes_shares_and_their_difference_from_the_same_questions():
    """Regions of more than half of an image have no place elsewhere: the control is of fewer questions."""
    scores = {
        "reliance_inside": Estimate(0.589, 0.5, 0.7, 30),
        "reliance_outside": Estimate(0.4, 0.3, 0.5, 30),
        "reliance_elsewhere": Estimate(0.597, 0.5, 0.7, 24),
        "reliance_margin": Estimate(-0.069, -0.219, 0.065, 24),
        "accuracy_intact": Estimate(0.5, 0.4, 0.6, 30),
    }
    page = reliance([RunResult("a", "A", scores)])
    assert page is not None
    shares = re.findall(r"[\d.]+ (?=%)|24|[-\u2212][\d.]+(?= \[)", page.sentences[0])
    assert [share.strip() for share in shares] == ["58.9", "24", "52.8", "59.7", "\u22126.9", "40.0"]
    whole = {name: replace(score, count=24) for name, score in scores.items()}
    page = reliance([RunResult("a", "A", whole)])
    assert page is not None and " % of the answers, hiding as much elsewhere " in page.sentences[0]
