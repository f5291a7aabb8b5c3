"""Phantom scans are exact and repeatable, and their questions cannot be answered without looking at the region."""

import hashlib
from collections import Counter
from functools import cache

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from a3tune.data.phantom import ask, make_scan, write_phantom
from a3tune.data.phantom.anatomy import LESION_KINDS, VIEWS
from a3tune.data.phantom.findings import findings
from a3tune.data.phantom.questions import GENERIC_TYPES, LOCALISED_TYPES, NUMBERS
from a3tune.data.phantom.scan import SIZE, Scan
from a3tune.data.rows import read_rows
from a3tune.masks import decode_mask
from a3tune.models import shipped


@cache
def scans() -> list[Scan]:
    """Drawn once, by the first test that looks at them: not while tests are collected."""
    return [make_scan((5, number)) for number in range(150)]


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(0)
    asked = [(scan, ask(scan, kind, rng)) for scan in scans() for kind in (*GENERIC_TYPES, *LOCALISED_TYPES)]
    return [(scan, question) for scan, question in asked if question is not None]


def test_a_seed_gives_one_scan():
    first, again, other = make_scan((1, 2)), make_scan((1, 2)), make_scan((1, 3))
    assert np.array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)


def test_every_view_and_modality_occurs():
    assert {(scan.body, scan.plane) for scan in scans()} == {(view.body, view.plane) for view in VIEWS}
    assert {scan.modality for scan in scans()} == {"CT", "MRI"}


def test_masks_are_exact():
    for scan in scans():
        assert scan.image.shape == (SIZE, SIZE) and scan.image.dtype == np.uint8
        assert not np.any(np.sum(list(scan.organs.values()), axis=0) > 1), "organs overlap"
        for lesion in scan.lesions:
            assert lesion.mask.any()
            assert not (lesion.mask & ~scan.organs[lesion.organ]).any(), "a lesion leaves its organ"
        assert not np.any(np.sum([lesion.mask for lesion in scan.lesions], axis=0) > 1), "lesions overlap"


def test_lesions_show_in_the_picture():
    contrast = {kind: [] for kind in LESION_KINDS}
    for scan in scans():
        for lesion in scan.lesions:
            others = np.any([other.mask for other in scan.lesions], axis=0)
            healthy = scan.organs[lesion.organ] & ~others
            contrast[lesion.kind].append(float(scan.image[lesion.mask].mean()) - float(scan.image[healthy].mean()))
    assert np.mean(contrast["cyst"]) < -15
    assert np.mean(contrast["mass"]) > 25
    assert np.mean(contrast["calcification"]) > 15


def truth(scan, question) -> bool:
    """Whether the answer follows from the scan: written anew, straight from the lesions."""
    here = [lesion for lesion in scan.lesions if lesion.organ == question.organ]
    match question.type:
        case "modality" | "body" | "plane":
            return question.answer == getattr(scan, question.type)
        case "presence":
            return question.answer == ("yes" if here else "no")
        case "presence of kind":
            named = next(kind for kind in LESION_KINDS if kind in question.prompt)
            return question.answer == ("yes" if named in [lesion.kind for lesion in here] else "no")
        case "kind":
            return [question.answer] == [lesion.kind for lesion in here]
        case "size":
            return [question.answer] == [lesion.size for lesion in here]
        case "position":
            middle = np.nonzero(scan.organs[question.organ])[0].mean()
            return len(here) == 1 and (question.answer == "upper") == (here[0].centre[0] < middle)
        case "count":
            return len(here) == NUMBERS.index(question.answer) + 1
        case "organ":
            named = next(kind for kind in LESION_KINDS if kind in question.prompt)
            return {lesion.organ for lesion in scan.lesions if lesion.kind == named} == {question.answer}
    raise AssertionError(question.type)


def test_answers_are_true_and_regions_decide_them(questions):
    for scan, question in questions:
        assert truth(scan, question), (question.type, question.prompt, question.answer)
        assert (question.region is None) == (question.type in GENERIC_TYPES)
        if question.region is not None:
            assert question.region.any() and not (question.region & ~scan.organs[question.organ]).any()


def test_all_types_are_asked_and_answers_are_balanced():
    rng = np.random.default_rng(1)
    for kind, answers in {
        "presence": 2,
        "presence of kind": 2,
        "kind": 4,
        "size": 2,
        "position": 2,
        "count": 3,
    }.items():
        found = Counter(q.answer for scan in scans() for _ in range(4) if (q := ask(scan, kind, rng)))
        assert len(found) == answers
        assert max(found.values()) / sum(found.values()) < 1 / answers + 0.17, (kind, found)


def test_written_rows_read_back(tmp_path):
    files = write_phantom(tmp_path, {"train": 3, "test": 2}, seed=4)
    train, test = (read_rows(files[split]) for split in ("train", "test"))
    assert not {s.meta["patient"] for s in train} & {s.meta["patient"] for s in test}
    for sample in train + test:
        with Image.open(sample.image) as image:
            assert image.size == (SIZE, SIZE)
        for region in sample.regions or ():
            assert decode_mask(region.mask).shape == (SIZE, SIZE)
    pictures = {hashlib.sha256(s.image.read_bytes()).hexdigest() for s in train}
    assert not pictures & {hashlib.sha256(s.image.read_bytes()).hexdigest() for s in test}


def test_writing_is_repeatable(tmp_path):
    for name in "ab":
        write_phantom(tmp_path / name, {"validation": 2}, seed=9)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert files
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_report_tells_the_truth_of_every_organ_in_words_that_the_base_reads():
    tokenizer = AutoTokenizer.from_pretrained(str(shipped("vlm")))
    known = {tokenizer.decode([token]) for token in range(len(tokenizer))}
    for scan in scans()[:30]:
        first, *sentences = findings(scan).removesuffix(".").split(". ")
        assert first == f"{scan.plane} {scan.modality} of the {scan.body}"
        for organ, sentence in zip(scan.hosts, sentences, strict=True):
            lesions = [lesion for lesion in scan.lesions if lesion.organ == organ]
            one = [f"one {lesion.size} {lesion.kind}" for lesion in lesions]
            many = f"{NUMBERS[len(lesions) - 1]} lesions"
            assert sentence == f"{organ}: " + ("no lesion" if not lesions else one[0] if len(one) == 1 else many)
            assert {f" {word}" for word in sentence.replace(":", "").split()} <= known
