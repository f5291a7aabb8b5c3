import csv
import gzip
import io
import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from a3tune.data.rows import read_rows
from a3tune.data.sets import DATA_SETS, check, detect, format_check, hub, prepare
from a3tune.data.sets.reading import Reading
from a3tune.data.sets.reports import report_sections, report_text
from a3tune.data.sets.slake import asked_regions
from a3tune.errors import DataError
from a3tune.masks import region_mask
from a3tune.types import Region
from rowfiles import written

DATA = Path(os.environ.get("A3TUNE_DATA", Path(__file__).parents[2] / "shared" / "data"))
real_slake = pytest.mark.skipif(not (DATA / "slake_questions").is_dir(), reason="needs SLAKE's questions (A3TUNE_DATA)")
real_vqa_rad = pytest.mark.skipif(not (DATA / "vqa_rad").is_dir(), reason="needs VQA-RAD (A3TUNE_DATA)")


def picture(path: Path, size: tuple[int, int] = (8, 6), level: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(path)
    return path


def lines_of(folder: Path) -> list[str]:
    return [f"{problem.file}: {problem.what}" for problem in check(folder).problems]


def slake_row(qid: int, image: int, question: str, **more) -> dict:
    row = {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": question,
        "answer": "Left",
        "q_lang": "en",
    }
    row |= {"location": "Abdomen", "modality": "CT", "answer_type": "OPEN", "base_type": "vqa", "qid": qid}
    return row | {"content_type": "Position", "triple": ["vhead", "_", "_"]} | more


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    folder = tmp_path / "Slake1.0"
    for image in range(3):
        place = folder / "imgs" / f"xmlab{image}"
        picture(place / "source.jpg")
        values = np.zeros((6, 8), np.uint8)
        values[1:3, 1:4], values[4:, 5:] = 1, 2
        Image.fromarray(values).save(place / "mask.png")
        written(place / "detection.json", [{"Liver": [0, 0, 8, 6]}, {"Liver Cancer": [1.0, 2.0, 3.0, 2.0]}])
    (folder / "mask.txt").write_text("1: Liver\n2: Left Kidney\n3: Spleen\n")
    rows = [
        slake_row(0, 0, "Where is the liver?"),
        slake_row(1, 0, "肝在哪里?", q_lang="zh"),
        slake_row(2, 0, "Which is bigger, kidney or liver?", content_type="Size"),
        slake_row(3, 0, "What modality is used?", content_type="Modality", answer="CT"),
        slake_row(4, 0, "Where is the abnormality?"),
        slake_row(5, 0, "Does the picture contain spleen?", answer="No", answer_type="CLOSED"),
    ]
    written(folder / "train.json", rows)
    written(folder / "validate.json", [slake_row(6, 1, "Where is the liver?")])
    written(folder / "test.json", [slake_row(7, 2, "Where is the liver cancer?")])
    return folder


def test_slake(slake, tmp_path):
    checked = check(slake)
    assert (checked.name, checked.ok, checked.problems) == ("slake", True, ())
    assert checked.rows == checked.usable == {"train": 5, "validation": 1, "test": 1}
    assert checked.with_regions == {"train": 3, "validation": 1, "test": 1}
    files = prepare(slake, tmp_path / "out")
    assert list(files) == ["train", "validation", "test"]
    train = {sample.meta["qid"]: sample for sample in read_rows(files["train"])}
    assert train["0"].meta == {"modality": "CT", "organ": "Abdomen", "question_type": "Position", "qid": "0"}
    assert [sample.answer_type for sample in train.values()] == ["open"] * 4 + ["closed"]
    names = {key: sample.regions and [region.name for region in sample.regions] for key, sample in train.items()}
    assert names == {"0": ["Liver"], "2": ["Liver", "Left Kidney"], "3": (), "4": ["Liver Cancer"], "5": None}
    mask = region_mask(train["0"].regions[0], 6, 8)
    assert np.argwhere(mask).tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3)]  # the mask, not the box
    assert read_rows(files["test"])[0].regions == (Region(box=(1, 2, 4, 4), name="Liver Cancer"),)
    assert json.loads(files["train"].read_text().splitlines()[0])["image"] == "../Slake1.0/imgs/xmlab0/source.jpg"


def test_everything_wrong_with_slake_is_listed_by_file(slake):
    (slake / "imgs" / "xmlab1" / "source.jpg").unlink()
    (slake / "imgs" / "xmlab2" / "source.jpg").unlink()
    (slake / "imgs" / "xmlab0" / "detection.json").write_text('[{"Liver": [1, 2, 3]}, {"Spleen": [90, 9, 1, 1]}]')
    picture(slake / "imgs" / "xmlab0" / "mask.png", (9, 6))
    (slake / "validate.json").unlink()
    rows = json.loads((slake / "train.json").read_text())
    rows += [slake_row(8, 2, "x"), slake_row(9, 2, "y", answer=""), slake_row(10, 0, "z", img_name="../../a.jpg"), 7]
    written(slake / "train.json", rows)
    assert lines_of(slake) == [
        "train.json: 1 of 10 entries are no objects",
        "validate.json: missing",
        "imgs/xmlab0/mask.png: left out: expected 8 x 6 pixels as its image, got 9 x 6",
        "imgs/xmlab0/detection.json: left out: Liver: expected a list of 4 finite numbers, got [1, 2, 3]",
        "imgs/xmlab0/detection.json: left out: Spleen: expected a box inside the image of 8 x 6 pixels, "
        "got [90.0, 9.0, 91.0, 10.0]",
        "train.json: slake-9 has no answer: left out",
        f"train.json: names an image wrongly: expected the name of a file inside {slake / 'imgs'}, '../../a.jpg' leads "
        "out of it",
        "imgs/xmlab2/source.jpg: missing; named by 2 rows of train.json, 1 rows of test.json",
    ]
    with pytest.raises(DataError, match=r"(?s)expected a complete SLAKE.*imgs/xmlab2/source\.jpg: missing"):
        prepare(slake, slake.parent / "out")
    assert not (slake.parent / "out").exists()


def test_slake_can_do_without_masks(slake, tmp_path):
    for file in [slake / "mask.txt", *slake.glob("imgs/*/mask.png")]:
        file.unlink()
    checked = check(slake)
    assert checked.ok
    assert Counter(problem.file.rpartition("/")[2] for problem in checked.problems) == {"mask.txt": 1, "mask.png": 3}
    sample = read_rows(prepare(slake, tmp_path / "out")["validation"])[0]
    assert sample.regions == (Region(box=(0, 0, 8, 6), name="Liver"),)
    (slake / "imgs" / "xmlab1" / "source.jpg").write_bytes(b"no image")
    assert "imgs/xmlab1/source.jpg: expected an image, could not decode it" in lines_of(slake)


def test_regions_that_a_slake_question_asks_about():
    lung, cancer, heart = (Region(box=(0, 0, 1, 1), name=name) for name in ("Left Lung", "Lung Cancer", "Heart"))
    everything = [lung, cancer, heart]
    assert asked_regions("Is the lung healthy?", "Abnormality", everything) == (lung,)
    assert asked_regions("Are there abnormalities in the left lung?", "Abnormality", everything) == (lung,)
    assert asked_regions("What diseases are included?", "Abnormality", everything) == (cancer,)
    assert asked_regions("What is the largest organ?", "Size", everything) is None
    assert asked_regions("Is this a CT of the heart?", "Modality", everything) == ()


@real_slake
def test_the_true_questions_of_slake():
    checked = check(DATA / "slake_questions")
    assert checked.rows == {"train": 4919, "validation": 1053, "test": 1061}
    assert checked.usable == {"train": 4918, "validation": 1053, "test": 1061}
    assert {key: checked.rows[key] for key in checked.published} == checked.published
    missing = [problem for problem in checked.problems if problem.blocking]
    assert len(missing) == 450 + 96 + 96 == sum(": missing" in f"{item.file}: {item.what}" for item in missing)
    assert sum(map(int, re.findall(r"(\d+) rows", " ".join(item.what for item in missing)))) == 4919 + 1053 + 1061


def vqa_rad_row(qid: int, image: str, phrase: str, **more) -> dict:
    row = {"qid": qid, "image_name": image, "image_organ": "CHEST", "question": "Is it big?", "answer": "Yes"}
    return row | {"answer_type": "CLOSED ", "question_type": "PRSE, ABN", "phrase_type": phrase} | more


def test_both_layouts_of_vqa_rad(tmp_path):
    train = [
        vqa_rad_row(1, "a.jpg", "freeform"),
        vqa_rad_row(2, "b.jpg", "frame"),
        vqa_rad_row(3, "b.jpg", "para", answer=7),
    ]
    test = [vqa_rad_row(4, "a.jpg", "freeform")]
    used, public = tmp_path / "used", tmp_path / "public"
    for folder in (used / "images", public / "VQA_RAD Image Folder"):
        picture(folder / "a.jpg")
        picture(folder / "b.jpg")
    written(used / "trainset.json", train)
    written(used / "testset.json", test)
    rows = [train[0], train[2], test[0] | {"phrase_type": "test_freeform", "qid": "4"}]
    written(public / "VQA_RAD Dataset Public.json", rows)
    for folder in (used, public):
        assert detect(folder) == "vqa-rad"
        assert check(folder).rows == {"train": 2, "test": 1}
        files = prepare(folder, tmp_path / f"{folder.name}-out")
        samples = [sample for file in files.values() for sample in read_rows(file)]
        assert [sample.id for sample in samples] == ["vqa-rad-1", "vqa-rad-3", "vqa-rad-4"]
        meta = {"organ": "chest", "question_type": "ABN+PRES", "phrase_type": "freeform", "qid": "1"}
        assert (samples[0].meta, samples[0].answer_type, samples[1].answer) == (meta, "closed", "7")
        assert samples[2].meta["phrase_type"] == "freeform"
    assert check(used, variant="all").rows == {"train": 3, "test": 1}
    with pytest.raises(DataError, match="variant 'some': expected one of paper, all, image-disjoint for vqa-rad"):
        check(used, variant="some")


@real_vqa_rad
def test_the_true_vqa_rad(tmp_path):
    folder = DATA / "vqa_rad"
    seen: list[tuple[int, int]] = []
    checked = check(folder, progress=lambda *counts: seen.append(counts))
    assert checked.rows == checked.usable == checked.published == {"train": 1797, "test": 451}
    assert (checked.ok, checked.problems, seen[-1]) == (True, (), (3515, 3515))
    assert check(folder, variant="all").rows == {"train": 3064, "test": 451}
    files = prepare(folder, tmp_path, variant="image-disjoint")
    train, test = (read_rows(files[split]) for split in ("train", "test"))
    assert len(train) + len(test) == 3515
    assert len({sample.id for sample in train + test}) == 3515
    images = [{sample.image for sample in part} for part in (train, test)]
    assert not images[0] & images[1]
    assert (len(images[0]), len(images[1])) == (251, 63)
    again = prepare(folder, tmp_path / "again", variant="image-disjoint")["test"]
    assert [sample.id for sample in read_rows(again)] == [sample.id for sample in test]
    assert Counter(sample.answer_type for sample in train + test) == {"closed": 1823 + 272, "open": 1241 + 179}


def encoded(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 3), level).save(buffer, "JPEG")
    return buffer.getvalue()


def write_parquet(folder: Path, images: dict[str, list[bytes]]) -> None:
    """Questions as the Hub has them, by split: the first has an open answer."""
    (folder / "data").mkdir(parents=True)
    for split, encoded_images in images.items():
        rows = [
            {"image": {"bytes": data, "path": None}, "question": f"q{n}?", "answer": "yes" if n else "a gland"}
            for n, data in enumerate(encoded_images)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / f"{split}-00000-of-00001.parquet")


def path_vqa_parquet(folder: Path) -> None:
    levels = {"train": (1, 1, 2), "validation": (3,), "test": (4,)}
    write_parquet(folder, {split: [encoded(level) for level in group] for split, group in levels.items()})


def test_path_vqa_from_parquet_writes_each_image_once(tmp_path):
    folder, out = tmp_path / "path-vqa", tmp_path / "out"
    path_vqa_parquet(folder)
    with pytest.raises(DataError, match=r"is parquet with 3 train, 1 validation, 1 test rows, as many as none.*--name"):
        check(folder)
    assert check(folder, "path-vqa").rows == {"train": 3, "validation": 1, "test": 1}
    first, second, _ = DATA_SETS["path-vqa"].read(Reading(folder), "paper")["train"]
    assert first.image is second.image  # thousands of questions share their images: each is in memory once
    files = prepare(folder, out, "path-vqa")
    train = read_rows(files["train"])
    assert [(sample.answer, sample.answer_type) for sample in train] == [
        ("a gland", "open"),
        ("yes", "closed"),
        ("yes", "closed"),
    ]
    assert train[0].image == train[1].image != train[2].image
    assert train[0].image.read_bytes() == encoded(1)
    train[0].image.write_bytes(encoded(2))  # its name says what it holds; prepared again, it does
    prepare(folder, out, "path-vqa")
    assert train[0].image.read_bytes() == encoded(1)
    assert len(list((out / "images").iterdir())) == 4
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    (folder / "data" / "validation-00000-of-00001.parquet").unlink()
    problems = [f"{problem.file}: {problem.what}" for problem in check(folder, "path-vqa").problems]
    assert problems[0] == "data/validation-00000-of-0000N.parquet: missing"
    assert problems[1].startswith("data/test-00000-of-00001.parquet: expected a complete parquet file")


@pytest.mark.parametrize(
    ("name", "module", "meta"),
    [
        ("path-vqa", "path_vqa", {"modality": "Pathology", "question_type": "open"}),
        ("slake", "slake", {"modality": "CT", "organ": "Lung"}),
        ("vqa-rad", "vqa_rad", {}),
    ],
)
@pytest.mark.parametrize("place", ["data", ".", "default"])
def test_parquet_is_recognised_by_its_rows_not_by_its_names(tmp_path, monkeypatch, name, module, meta, place):
    folder, splits = tmp_path / "path-vqa", {"train": 2, "validation": 1, "test": 1}
    if name == "vqa-rad":
        del splits["validation"]
    for split, count in splits.items():
        about = {"modality": "CT", "location": "Lung"} if name == "slake" else {}
        rows = [{"image": {"bytes": encoded(7), "path": None}, "question": "q?", "answer": "a gland"} | about] * count
        file = f"{split}/0.parquet" if place == "default" else f"{split}-00000-of-00001.parquet"
        (folder / place / file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / place / file)
    with pytest.raises(DataError, match="as many as none of them"):
        detect(folder)
    monkeypatch.setattr(f"a3tune.data.sets.{module}._ROWS_ON_HUB", splits)
    checked = check(folder)
    assert (checked.name, checked.rows, checked.ok) == (name, splits, True)
    sample = read_rows(prepare(folder, tmp_path / "out")["train"])[0]
    assert (sample.prompt, sample.answer, sample.meta) == ("q?", "a gland", meta)


def test_counts_of_parquet_need_the_columns(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "train-0.parquet")
    assert hub.counts(tmp_path) == {}
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    assert hub.counts(tmp_path) == {}


def test_path_vqa_as_json_and_never_as_a_pickle(tmp_path):
    folder = tmp_path / "pvqa"
    for split in ("train", "val", "test"):
        picture(folder / "images" / split / f"{split}_0001.jpg")
        written(
            folder / "qas" / split / f"{split}_qa.json", [{"image": f"{split}_0001", "question": "q", "answer": "no"}]
        )
    files = prepare(folder, tmp_path / "out")
    assert read_rows(files["validation"])[0].image.name == "val_0001.jpg"
    (folder / "qas" / "test" / "test_qa.json").unlink()
    (folder / "qas" / "test" / "test_qa.pkl").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    assert re.match(r"qas/test/test_qa\.pkl: a pickle can run any code", lines_of(folder)[0])
    (folder / "images" / "train" / "train_0001.jpg").unlink()
    assert "images/train/train_0001.jpg: missing; named by 1 rows of qas/train/train_qa.json" in lines_of(folder)


@pytest.mark.parametrize(
    ("name", "file", "image"),
    [
        ("iu-xray-vqa", "iuxray_factuality.jsonl", "CXR{}_IM-1/0.png"),
        ("omnimedvqa", "omnimedvqa_factuality.jsonl", "Images/ACRIMA/{}.png"),
    ],
)
def test_cares(tmp_path, name, file, image):
    folder = tmp_path / name
    for number in range(10):
        path = image.format(number)
        picture(folder / path if path.startswith("Images") else folder / "images" / path)
    answers = ["Yes.", "No (since there is none).", "Not stated."]
    rows = [
        {
            "question_id": 0,
            "image": image.format(n % 10),
            "text": f"Is it {n}? [yes, no]\n<image>",
            "answer": answers[n % 3],
        }
        for n in range(40)
    ]
    written(folder / file, rows)
    assert detect(folder) == name
    files = prepare(folder, tmp_path / "out")
    train, test = (read_rows(files[split]) for split in ("train", "test"))
    assert (len(train), len(test)) == (28, 12)
    assert not {sample.image for sample in train} & {sample.image for sample in test}
    kinds = {(sample.answer, sample.answer_type) for sample in train + test}
    assert kinds == {("Yes", "closed"), ("No", "closed"), ("Not stated.", "open")}
    assert all("<image>" not in sample.prompt for sample in train)
    rows[3]["image"] = image.format(77)
    written(folder / file, rows)
    assert f"named by 1 rows of {file}" in lines_of(folder)[0]


def test_omni_med_vqa_as_published_is_multiple_choice(tmp_path):
    rows = []
    for index in range(10):
        picture(tmp_path / "Images" / "ACRIMA" / f"{index}.png")
        options = {"option_A": "Fundus", "option_B": "CT", "option_C": "MR", "option_D": "CT"}
        about = {"dataset": "ACRIMA", "question_type": "Modality Recognition", "modality_type": "Fundus Photography"}
        asked = {"question": "What is this?", "gt_answer": "Fundus", "image_path": f"Images/ACRIMA/{index}.png"}
        rows.append(about | asked | options)
    rows[0]["modality"] = rows[0].pop("modality_type")
    rows.append(rows[1] | {"gt_answer": "X-ray"})
    written(tmp_path / "QA_information" / "Open-access" / "ACRIMA.json", rows)
    found = check(tmp_path)
    assert found.name == "omnimedvqa-choice" and found.ok
    assert dict(found.rows) == {"train": 7, "test": 3, "left out": 1}
    assert found.left_out == {"no image, or no options with the answer": 1}
    assert [problem.what for problem in found.problems if "ACRIMA-11: expected" in problem.what]
    files = prepare(tmp_path, tmp_path / "out")
    samples = [sample for file in files.values() for sample in read_rows(file)]
    assert {sample.options for sample in samples} == {("Fundus", "CT", "MR")}
    assert {sample.prompt for sample in samples} == {"What is this? Choose one: Fundus; CT; MR."}
    assert {sample.meta["modality"] for sample in samples} == {"Fundus Photography"}
    assert {sample.answer_type for sample in samples} == {"choice"}


def test_iu_xray_reports(tmp_path):
    folder = tmp_path / "iu_xray"
    study = {
        "id": "CXR7_IM-0942",
        "report": "The lungs are\nclear .",
        "image_path": ["CXR7_IM-0942/0.png", "CXR7_IM-0942/1.png"],
    }
    picture(folder / "images" / "CXR7_IM-0942" / "0.png")
    written(
        folder / "annotation.json",
        {"train": [study], "val": [], "test": [study | {"id": "CXR8_IM-1", "image_path": []}]},
    )
    assert lines_of(folder) == ["annotation.json: names an image wrongly: expected the name of a file, got None"]
    written(folder / "annotation.json", {"train": [study], "val": [], "test": []})
    sample = read_rows(prepare(folder, tmp_path / "out")["train"])[0]
    assert (sample.answer, sample.answer_type) == ("The lungs are clear .", "report")
    assert sample.image.name == "0.png"
    (folder / "ecgen-radiology").mkdir()
    report = (
        '<e><AbstractText Label="FINDINGS">x</AbstractText><AbstractText Label="IMPRESSION">Normal.</AbstractText></e>'
    )
    (folder / "ecgen-radiology" / "7.xml").write_text(report)
    assert read_rows(prepare(folder, tmp_path / "out")["train"])[0].answer == "The lungs are clear . Normal."
    (folder / "ecgen-radiology" / "7.xml").write_text("<e>")
    assert check(folder).ok
    assert "ecgen-radiology/7.xml: expected an XML report" in lines_of(folder)[0]
    for text in ("[]", "{", '{"train": 7}'):
        (folder / "annotation.json").write_text(text)
        assert lines_of(folder)[0].startswith("annotation.json: expected")


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites

 FINDINGS: {findings}

 IMPRESSION:

 No acute
 process at 10:30.
"""


def test_sections_of_a_report():
    sections = report_sections(REPORT.format(findings="There is no focal\n consolidation."))
    assert sections["FINDINGS"] == "There is no focal consolidation."
    assert sections["IMPRESSION"] == "No acute process at 10:30."
    assert sections["EXAMINATION"] == "CHEST (PA AND LAT)"
    assert report_sections("no headings") == {}


LUNGS = "The lungs are clear."
HEART = "The heart is of normal size."


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (f"FINDINGS:\n LUNGS: {LUNGS}\n HEART: {HEART}\n", f"LUNGS: {LUNGS} HEART: {HEART}"),
        (f"FINDINGS: {LUNGS}\n PLEURA: No effusion.\nIMPRESSION: {HEART}", f"{LUNGS} PLEURA: No effusion. {HEART}"),
        (f"INDICATION: Cough.\nFINDINGS/IMPRESSION: {LUNGS}", LUNGS),
        (f"INDICATION: Cough.\nIMPRESSION AND FINDINGS: {LUNGS}", LUNGS),
        (f"TECHNIQUE: PA.\n Findings: {LUNGS}\n Impression: {HEART}", f"{LUNGS} {HEART}"),
        (f"FINDING: {LUNGS}\nCONCLUSION: {HEART}", f"{LUNGS} {HEART}"),
        (f"IMPRESSION: {HEART}\nFINDINGS: {LUNGS}", f"{LUNGS} {HEART}"),
        (f"FINAL REPORT\n INDICATION: Cough.\n\n COMPARISON: None.\n\n {LUNGS}\n {HEART}", f"{LUNGS} {HEART}"),
        (f" FINAL REPORT\n {LUNGS}\n\n {HEART}", f"{LUNGS} {HEART}"),
        (f"FINDINGS: {LUNGS}\nRECOMMENDATION: Follow up.", LUNGS),
        ("INDICATION: Cough.\n\nTECHNIQUE: PA and lateral.", ""),
        ("FINDINGS:\n\nIMPRESSION:\n", ""),
    ],
)
def test_findings_and_impression_as_radiologists_write_them(report, text):
    assert report_text(report) == text


def mimic_cxr(folder: Path) -> None:
    studies = [("10000032", "50414267", "train"), ("10000032", "53189527", "train"), ("11000033", "50000014", "test")]
    rows, views = [], []
    for subject, study, split in studies:
        place = folder / "files" / f"p{subject[:2]}" / f"p{subject}"
        for dicom, view in (("0a-1", "LATERAL"), ("0b-2", "PA")):
            picture(place / f"s{study}" / f"{dicom}.jpg")
            rows.append({"dicom_id": dicom, "study_id": study, "subject_id": subject, "split": split})
            views.append({"dicom_id": dicom, "ViewPosition": view})
        long = "The heart size is normal and both lungs are clear."
        (place / f"s{study}.txt").write_text(REPORT.format(findings="Fine." if study == "53189527" else long))
    for name, table in (("split", rows), ("metadata", views)):
        with gzip.open(folder / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


def test_mimic_cxr_reports(tmp_path):
    folder = tmp_path / "mimic"
    folder.mkdir()
    mimic_cxr(folder)
    checked = check(folder)
    listed = ["files/p10/p10000032/s53189527.txt: 6 words of findings and impression found in it: left out"]
    assert (checked.name, checked.ok, lines_of(folder)) == ("mimic-cxr", True, listed)
    assert checked.left_out == {"with fewer than 10 words": 1}
    assert (checked.rows, checked.usable) == ({"train": 2, "test": 1}, {"train": 1, "test": 1})
    sample = read_rows(prepare(folder, tmp_path / "out")["train"])[0]
    assert sample.answer == "The heart size is normal and both lungs are clear. No acute process at 10:30."
    assert (sample.image.name, sample.meta["patient"]) == ("0b-2.jpg", "10000032")  # the frontal view
    (folder / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    next(folder.rglob("s50000014.txt")).unlink()
    for image in folder.rglob("s50414267/*.jpg"):
        image.unlink()
    assert lines_of(folder) == [
        "mimic-cxr-2.0.0-metadata.csv.gz: missing: the first image of a study is taken, frontal or not",
        "files: 1 of 2 train studies (50%) are on the disk, 2,000 at most are drawn from these; 1 have no image "
        "(as files/p10/p10000032/s50414267/0a-1.jpg)",
        "files: 0 of 1 test studies (0%) are on the disk, 500 at most are drawn from these; 1 have no report "
        "(as files/p11/p11000033/s50000014.txt)",
        "files/p10/p10000032/s53189527.txt: 6 words of findings and impression found in it: left out",
    ]
    assert not check(folder).ok
    (folder / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(b"\x1f\x8bno")
    assert lines_of(folder)[0].startswith("mimic-cxr-2.0.0-split.csv.gz: expected a table with the columns dicom_id")


def test_a_part_of_mimic_cxr_is_enough(tmp_path):
    folder = tmp_path / "mimic"
    folder.mkdir()
    mimic_cxr(folder)
    with gzip.open(folder / "mimic-cxr-2.0.0-split.csv.gz", "at", newline="") as file:
        for number in range(30):
            file.write(f"0c-3,{60000000 + number},12000034,{'test' if number % 3 else 'train'}\r\n")
    whole = {split: [row.id for row in read_rows(file)] for split, file in prepare(folder, tmp_path / "out").items()}
    assert whole == {"train": ["mimic-cxr-50414267"], "test": ["mimic-cxr-50000014"]}
    checked = check(folder)
    assert checked.ok and checked.rows == {"train": 2, "test": 1}
    assert "files: 2 of 12 train studies (17%) are on the disk" in format_check(checked)


def test_a_part_of_iu_xray_is_enough(tmp_path):
    studies = [{"id": f"CXR{n}_IM-1", "report": "Clear lungs .", "image_path": [f"CXR{n}/0.png"]} for n in range(3)]
    written(tmp_path / "annotation.json", {"train": studies, "val": [], "test": studies[:1]})
    picture(tmp_path / "images" / "CXR0" / "0.png")
    checked = check(tmp_path)
    assert (checked.rows, checked.usable, checked.ok) == ({"train": 3, "test": 1}, {"train": 1, "test": 1}, True)
    assert checked.left_out == {"image not on the disk": 2}
    assert "2 rows left out: 2 image not on the disk" in format_check(checked)
    (tmp_path / "images" / "CXR0" / "0.png").unlink()
    assert not check(tmp_path).ok and format_check(check(tmp_path)).endswith("not complete: no usable row")


def test_folders_and_names_that_fit_nothing(tmp_path):
    known = "slake, vqa-rad, path-vqa, iu-xray-vqa, omnimedvqa, omnimedvqa-choice, iu-xray, mimic-cxr"
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for name, message in (("none", "is missing"), ("empty", "is empty"), ("other", f"one of {known}, it fits none")):
        with pytest.raises(DataError, match=message):
            detect(tmp_path / name)
    with pytest.raises(DataError, match=f"data set 'slak': expected one of {known}; did you mean 'slake'"):
        check(tmp_path / "other", "slak")
    with pytest.raises(DataError, match="fits vqa-rad and iu-xray: name one"):
        written(tmp_path / "other" / "annotation.json", {})
        written(tmp_path / "other" / "testset.json", [])
        detect(tmp_path / "other")
    assert ", ".join(DATA_SETS) == known
    missing = [problem.file for problem in check(tmp_path / "other", "slake").problems]
    assert missing == ["mask.txt", "train.json", "validate.json", "test.json"]
    with pytest.raises(DataError, match="no usable row"):
        written(tmp_path / "other" / "trainset.json", [])
        prepare(tmp_path / "other", tmp_path / "out", "vqa-rad")


def test_a_check_reads_as_a_table_beside_table_6(slake):
    (slake / "imgs" / "xmlab2" / "source.jpg").unlink()
    (slake / "mask.txt").unlink()
    text = format_check(check(slake))
    table = [line.split() for line in text.splitlines()[2:6]]
    assert table[1:] == [
        ["train", "5", "5", "3", "4,919"],
        ["validation", "1", "1", "1", "-"],
        ["test", "1", "1", "0", "1,061"],
    ]
    assert "1 must be mended:\n  imgs/xmlab2/source.jpg: missing; named by 1 rows of test.json" in text
    assert "1 can be done without:\n  mask.txt: missing" in text
    assert text.endswith("not complete")


def test_images_that_were_not_unpacked_are_told_first(slake):
    (slake / "imgs.zip").write_bytes(b"PK")
    (slake / "notes.csv.gz").write_bytes(b"")
    assert "imgs.zip" not in format_check(check(slake))
    (slake / "imgs" / "xmlab2" / "source.jpg").unlink()
    with pytest.raises(DataError, match=r"(?s)all:\n  imgs\.zip: packed.*unpack it here\n  imgs/xmlab2") as told:
        prepare(slake, slake.parent / "out")
    assert "notes.csv.gz" not in str(told.value)  # one file, read as it is


def test_the_counts_of_table_6():
    counts = [tuple(data_set.published.values()) for data_set in DATA_SETS.values() if data_set.published]
    assert counts == [(4919, 1061), (1797, 451), (19755, 6761), (1789, 784), (6155, 2642), (2069, 590), (1902, 441)]
