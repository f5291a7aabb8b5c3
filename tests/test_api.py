"""The public face: few names, found by whoever looks for them; whatever a stranger hands in gives one answer."""

import ast
import inspect
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import a3tune
from a3tune.config import LabelsConfig, load_config
from a3tune.data.images import load_image
from a3tune.data.memory import image_source
from a3tune.data.phantom import write_phantom
from a3tune.data.rows import read_rows
from a3tune.evaluation.evaluate import evaluate
from a3tune.labels.make import make_maker
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.patches import paint

QUESTION = "Is there a lesion in the liver?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("face")
    write_phantom(folder, {"train": 1, "test": 1}, seed=4)
    return folder


@pytest.fixture(scope="module")
def vlm(vlm_folder: Path) -> a3tune.Model:
    return a3tune.load(vlm_folder, device="cpu")


@pytest.fixture(scope="module")
def scan(folder: Path) -> Path:
    return folder / "images" / "test-0000-0.png"


def test_every_name_is_there_and_in_the_table_of_contents():
    assert {*dir(a3tune)} == {*a3tune.__all__, "__version__"} and len(a3tune.__all__) <= 16
    for name in a3tune.__all__:
        assert inspect.getdoc(getattr(a3tune, name)), name
        assert name in (a3tune.__doc__ or ""), name
    assert not hasattr(a3tune, "numpy") and not hasattr(a3tune, "no_such_name")


def test_type_checkers_see_what_is_imported_later():
    (block,) = (node for node in ast.parse(inspect.getsource(a3tune)).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert {*seen} == {*a3tune.__all__}
    for name, home in seen.items():
        if name != "errors":
            assert getattr(a3tune, name) is getattr(__import__(home, fromlist=[name]), name), name


def test_an_answer_is_that_of_an_evaluation(vlm: a3tune.Model, scan: Path):
    answer = vlm.ask(scan, QUESTION, max_new_tokens=6)
    sample = a3tune.Sample("question", scan, QUESTION, "no", "closed")
    settings = load_config(None, ["evaluation.max_new_tokens=6"]).active_evaluation
    results = evaluate(vlm, [sample], settings)
    assert answer.text == results.predictions[0].prediction and "".join(answer.tokens).strip() == answer.text
    size = (answer.image.height, answer.image.width)
    painted = paint(results.maps["question"].astype(np.float32), token_boxes(vlm, *size), size)
    np.testing.assert_allclose(answer.map / answer.map.max(), painted, atol=2e-3)
    assert answer.map.shape == size == np.asarray(answer.picture()).shape[:2]
    assert "values" not in repr(answer) and len(repr(vlm)) < 300


def test_scores_are_those_of_an_evaluation(vlm: a3tune.Model, folder: Path):
    sample = next(one for one in read_rows(folder / "test.jsonl") if one.regions)
    expected = evaluate(vlm, [sample]).predictions[0].attention
    assert sample.regions
    scores = vlm.ask(sample.image, sample.prompt).scores(sample.regions[0])
    assert scores and all(scores[name] == pytest.approx(expected[name], abs=1e-3) for name in scores)


def test_a_region_is_a_box_or_a_mask(vlm: a3tune.Model, scan: Path):
    answer = vlm.ask(scan, QUESTION, max_new_tokens=2)
    mask = np.zeros((answer.image.height, answer.image.width), bool)
    mask[10:30, 20:50] = True
    assert answer.scores((20, 10, 50, 30)) == answer.scores(mask) == answer.scores(a3tune.Region(box=(20, 10, 50, 30)))
    assert answer.scores(mask) == answer.scores(mask.astype(np.uint8) * 255) == answer.scores(mask.astype(float))
    soft = np.linspace(0, 1, mask.size).reshape(mask.shape)
    shares, endless = (0.1, 0.1, 0.5, 0.5), (0, 0, float("inf"), 9)
    for wrong in ((1, 2, 3), (30, 10, 20, 50), mask[:5], "liver", soft, shares, endless):
        with pytest.raises(a3tune.errors.LabelError, match="region: expected"):
            answer.scores(wrong)  # type: ignore[arg-type]


def test_a_method_that_is_told_the_region(vlm: a3tune.Model, scan: Path):
    with pytest.raises(a3tune.errors.ModelError, match="true regions"):
        vlm.ask(scan, QUESTION, decode="controlmllm")
    assert vlm.ask(scan, QUESTION, decode="controlmllm", region=(10, 10, 60, 60), max_new_tokens=2).tokens


def turned(image: Image.Image) -> Image.Image:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3
    image.rotate(180).save(file, "PNG", exif=exif)
    return Image.open(file)


def closed() -> Image.Image:
    image = Image.new("L", (2, 2))
    image.close()
    return image


FORMS: dict[str, Callable[[Path], Any]] = {
    "text": str,
    "bytes": Path.read_bytes,
    "picture": Image.open,
    "RGBA": lambda path: Image.open(path).convert("RGBA"),
    "array": lambda path: np.asarray(Image.open(path).convert("RGB")),
    "array with opacity": lambda path: np.asarray(Image.open(path).convert("RGBA")),
    "turned by EXIF": lambda path: turned(Image.open(path)),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_may_come_in_any_form(form: str, scan: Path):
    found = load_image(image_source(FORMS[form](scan)))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(scan)))


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32", "float64"])
def test_deep_arrays_are_windowed_as_files_are(kind: str, tmp_path: Path):
    values = np.arange(600).reshape(20, 30) * 50
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "deep.png")
    expected = np.asarray(load_image(tmp_path / "deep.png"))
    np.testing.assert_array_equal(np.asarray(load_image(image_source(values.astype(kind)))), expected)
    if kind == "float32":
        picture = Image.fromarray(values.astype(kind))
        np.testing.assert_array_equal(np.asarray(load_image(image_source(picture))), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "expected a path, the bytes"),
        (np.zeros(4), "one of 4"),
        (np.zeros((2, 3, 8)), "one of 2 x 3 x 8"),
        (np.zeros((0, 3)), "one of 0 x 3"),
        (np.full((2, 2), "a"), "array of numbers"),
        (np.full((2, 2), np.nan), "finite"),
        ("https://example.org/scan.png", "image: expected the path of a file, got an address"),
        ("data:image/png;base64,AAAA", "got the image itself"),
        ("", "got 0 characters"),
        (closed(), "Pillow image that can be read: Operation on closed image"),
    ],
)
def test_what_is_no_image_is_told(image: Any, message: str):
    with pytest.raises(a3tune.errors.DataError, match=message):
        image_source(image)


def test_rows_in_memory_are_rows_of_a_file(folder: Path):
    expected = a3tune.read_rows(folder / "test.jsonl")
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = folder / row["image"]
    assert a3tune.read_rows(rows) == a3tune.read_rows(iter(expected)) == expected
    columns = [row | {"image": {"bytes": row["image"].read_bytes(), "path": None}, "options": None} for row in rows]
    assert [one.image for one in a3tune.read_rows(columns)] == [row["image"].read_bytes() for row in rows]
    frame = pd.DataFrame(columns)
    assert a3tune.read_rows(frame) == a3tune.read_rows(columns)
    frame.loc[1, "meta"] = frame.loc[1, "answer_type"] = None
    assert a3tune.read_rows(frame)[1].meta == {}
    del rows[1]["id"]
    assert a3tune.read_rows(rows)[1].id == "row-1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.png", "prompt": "Where?"}], r"rows\[0\]: answer: expected a text, the field is missing"),
        ([{"prompt": "Where?", "answer": "left"}], r"rows\[0\]: image: expected an image"),
        ([{"image": 3, "prompt": "Where?", "answer": "left"}], r"rows\[0\]: image: expected a path"),
        ([{"image": "http://x/a.png", "prompt": "Where?", "answer": "left"}], r"rows\[0\]: image: .*address"),
        ([{"image": "a", "question": "Where?", "answer": "left"}], r"rows\[0\]: unknown field 'question'"),
        (["a.png"], r"rows\[0\]: expected a mapping"),
        ([], "at least one"),
        ({"image": "a.png"}, "expected a file, or a list"),
        (b"rows.jsonl", "expected a file, or a list"),
        (7, "expected a file, or a list"),
    ],
)
def test_a_row_that_lacks_something_is_named(rows: Any, message: str):
    with pytest.raises(a3tune.errors.DataError, match=message):
        a3tune.read_rows(rows)


def test_found_regions_are_what_labels_are_made_of(scan: Path):
    found = a3tune.find_regions(np.asarray(Image.open(scan)), QUESTION, top_k=2)
    maker = make_maker(LabelsConfig())
    expected = maker.find(load_image(scan), a3tune.Sample("", b"", QUESTION, "", "open")).labels("", 2)
    assert [one.region.mask for one in found] == [segment.mask for segment in expected.segments]
    assert [one.similarity for one in found] == list(expected.similarity)
    x0, y0, x1, y1 = map(int, found[0].box)
    assert found[0].mask[y0:y1, x0:x1].sum() == found[0].mask.sum() > 0


def test_types_of_numpy_and_torch_are_settings(vlm_folder: Path, scan: Path):
    loaded = a3tune.load(vlm_folder, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16 and loaded.device.type == "cpu"
    answer = loaded.ask(scan, QUESTION, max_new_tokens=np.int64(2), tau=np.float64(0.2))
    assert len(answer.tokens) <= 2 and answer.settings.tau == 0.2


def test_an_adapter_in_place_of_a_model_is_told(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "adapter"):
        with pytest.raises(a3tune.errors.ModelError, match=r"got an adapter; .*a3tune\.load\(adapter="):
            a3tune.load(folder)


def test_from_rows_to_a_table(vlm_folder: Path, folder: Path, tmp_path: Path):
    rows, test = folder / "train.jsonl", folder / "test.jsonl"
    made = a3tune.label(rows, tmp_path / "labels")
    assert made.images and not made.failures
    run = a3tune.train(
        model={"path": vlm_folder, "device": "cpu"},
        data={"train": rows},
        labels={"store": tmp_path / "labels"},
        adapter={"rank": 2, "expert_rank": 2},
        alignment={"heads": 2},
        training={"max_steps": 1, "batch_size": 2},
        output=tmp_path / "mine",
    )
    vlm = a3tune.load(adapter=run, device="cpu")
    assert vlm.name == str(vlm_folder) and vlm.subject.config.alignment.heads == 2
    assert a3tune.load(vlm_folder, run.adapter, device="cpu").subject.adapter == vlm.subject.adapter == run.adapter
    results = a3tune.evaluate(vlm, test, out=run, max_new_tokens=3)
    a3tune.evaluate(a3tune.load(vlm_folder, device="cpu"), test, out=tmp_path / "base", max_new_tokens=3)
    assert a3tune.evaluate(vlm, a3tune.read_rows(test), max_new_tokens=3).predictions == results.predictions
    table = a3tune.compare([tmp_path / "base", run])
    assert "| base |" in table and "| mine |" in table


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "nothing to load": (lambda vlm: a3tune.load(), "expected a model"),
    "no such model": (lambda vlm: a3tune.load("./nosuch"), "nosuch"),
    "no such adapter": (lambda vlm: a3tune.load("tiny", "nosuch"), "expected an adapter folder"),
    "dtype": (lambda vlm: a3tune.load("tiny", dtype="fp8"), "model.dtype: expected"),  # type: ignore[arg-type]
    "no such image": (lambda vlm: vlm.ask("nosuch.png", QUESTION), "nosuch.png"),
    "no question": (lambda vlm: vlm.ask(np.zeros((8, 8)), " "), "question: expected"),
    "setting": (lambda vlm: vlm.ask(b"", QUESTION, max_tokens=3), "did you mean evaluation.max_new_tokens"),
    "heads": (lambda vlm: vlm.ask(b"", QUESTION, heads=9999), "evaluation.heads: expected at most"),
    "method": (lambda vlm: vlm.ask(b"", QUESTION, decode="vcdd"), "vcd, dola"),
    "segmenter": (lambda vlm: a3tune.find_regions(np.zeros((8, 8), np.uint8), "?", proposer="samm"), "superpixels"),
    "setting of labels": (lambda vlm: a3tune.find_regions(b"", "Where?", topk=1), "did you mean labels.top_k"),
    "section": (lambda vlm: a3tune.train(trianing={"max_steps": 1}), "did you mean training"),
    "no rows": (lambda vlm: a3tune.train(output="x"), "data.train"),
    "rows in memory": (
        lambda vlm: a3tune.evaluate(vlm, [{"image": b"x", "prompt": "?", "answer": "a"}], out="x"),
        "in memory",
    ),
    "no model": (lambda vlm: a3tune.evaluate("tiny", "rows.jsonl"), "what a3tune.load returns"),  # type: ignore[arg-type]
    "no run": (lambda vlm: a3tune.compare(["nosuch"]), "expected the folder of a run"),
    "one run": (lambda vlm: a3tune.compare("nosuch"), "expected a list of folders"),
    "no runs": (lambda vlm: a3tune.compare([]), "expected at least one"),
    "results": (lambda vlm: a3tune.compare([object()]), r"runs\[0\]: expected a path, got object"),  # type: ignore
    "form": (lambda vlm: a3tune.compare(["nosuch"], form="html"), r"form: expected one of \.md"),
    "model to load": (lambda vlm: a3tune.load(vlm), "load: path: expected a path, got Model"),
    "adapters": (lambda vlm: a3tune.load("tiny", ["a", "b"]), "load: adapter: expected a path, got list"),  # type: ignore
    "rows to label": (lambda vlm: a3tune.label([{}], "x"), "label: rows: expected a path, got list"),  # type: ignore
    "settings at once": (lambda vlm: a3tune.train({"output": "x"}), "train: config: expected a path"),  # type: ignore
    "nothing to find": (lambda vlm: a3tune.find_regions(np.zeros((8, 8)), ""), "question: expected"),
    "no text": (lambda vlm: a3tune.find_regions(np.zeros((8, 8)), None), "question: expected"),  # type: ignore
    "half a letter": (lambda vlm: vlm.ask(np.zeros((8, 8)), "Where\ud800"), "half of a letter"),
    "half a letter in a row": (
        lambda vlm: a3tune.evaluate(vlm, [{"image": np.zeros((8, 8)), "prompt": "Where\ud800", "answer": "yes"}]),
        r"^rows\[0\]: prompt: expected a text, got one with half of a letter",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_an_error_of_ours(wrong: str, vlm: a3tune.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    call, message = WRONG[wrong]
    with pytest.raises(a3tune.A3TuneError, match=message):
        call(vlm)
    assert list(tmp_path.iterdir()) == []
