import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.data.checking import check_rows, format_rows_check
from a3tune.errors import DataError
from a3tune.masks import encode_mask
from a3tune.vlm.encode import prepare
from a3tune.vlm.load import load_vlm

ROW = {"image": "a.png", "prompt": "Where is it?", "answer": "left lung"}
EMPTY = {"size": [6, 8], "counts": encode_mask(np.zeros((6, 8))).counts}


def rows(folder: Path, *changes: dict | str) -> Path:
    Image.new("L", (8, 6)).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    lines = [item if isinstance(item, str) else json.dumps(ROW | item) for item in changes]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder / "mine.jsonl"


def test_every_row_image_and_region_is_looked_at(tmp_path):
    path = rows(
        tmp_path,
        {"id": "1", "regions": [{"box": [0, 0, 8, 6]}]},
        {"id": "2", "answer": "yes"},
        {"id": "1"},
        {"id": "3", "answer": ""},
        "{no json",
        {"id": "4", "image": "none.png"},
        {"id": "5", "image": "broken.png"},
        {"id": "6", "regions": [{"box": [0, 0, 9, 6]}]},
        {"id": "7", "regions": [{"box": [20, 20, 30, 30]}]},
        {"id": "8", "regions": [{"rle": EMPTY}]},
        {"id": "9", "regions": [{"rle": EMPTY | {"size": [8, 6]}}]},
    )
    counts: list[tuple[int, int]] = []
    check = check_rows(path, lambda *count: counts.append(count))
    assert (check.rows, check.usable, check.images, check.with_regions, check.ok) == (11, 2, 1, 1, False)
    assert check.kinds == {"open": 1, "closed": 1} and counts[-1] == (8, 8)
    wanted = {
        3: "id: '1' is also at",
        4: "answer: expected a text that is not empty",
        5: "expected one JSON object per line",
        6: "No such file",
        7: "broken.png",
        8: "regions[0]: box [0.0, 0.0, 9.0, 6.0] ends outside of the image of 8 x 6 pixels",
        9: "regions[0]: box (20.0, 20.0, 30.0, 30.0): expected some of it inside",
        10: "regions[0]: expected a mask of something",
        11: "regions[0]: region '': expected a mask of the image's 8 x 6 pixels",
    }
    for line, text in wanted.items():
        assert any(f"mine.jsonl:{line}: " in problem and text in problem for problem in check.problems), line
    assert len(check.problems) == len(wanted)
    assert "11 rows, 2 usable, 9 not\nanswers: 1 closed, 1 open\n1 images; 1 rows have regions" in format_rows_check(
        check
    )


def test_good_rows_and_none(tmp_path):
    assert check_rows(rows(tmp_path, {"id": "1"}, "", {"id": "2"})).ok
    for path in (rows(tmp_path, ""), tmp_path / "none.jsonl"):
        with pytest.raises(DataError, match="expected"):
            check_rows(path)


def check(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["data", "check", *map(str, arguments)])
    assert result.exit_code == code and "Traceback" not in result.output, result.output
    return " ".join(result.output.split())


def noisy(path: Path, seed: int) -> None:
    """An image in which superpixels find something."""
    Image.fromarray(np.kron(np.random.default_rng(seed).integers(0, 255, (4, 4)), np.ones((16, 16))).astype("u1")).save(
        path
    )


def test_labels_of_rows_are_counted(tmp_path, monkeypatch):
    path = rows(tmp_path, {"id": "1"}, {"id": "2", "prompt": "What else?"}, {"id": "3", "answer": ""})
    noisy(tmp_path / "a.png", 0)
    noisy(tmp_path / "b.png", 1)
    Image.new("L", (64, 64)).save(tmp_path / "flat.png")
    store = tmp_path / "labels"
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(ROW | {"id": name, "image": name}) + "\n" for name in ("a.png", "flat.png")))
    assert CliRunner().invoke(app, ["label", str(labelled), "--out", str(store)]).exit_code == 0
    more = [{"id": name, "image": name} for name in ("flat.png", "b.png")]
    path.write_text(path.read_text() + "".join("\n" + json.dumps(ROW | row) for row in more))
    said = check(path, "--labels", store, code=1)
    assert "5 rows, 4 usable, 1 not" in said
    counts = (
        "2 of 4 usable rows have some, 1 of these none that is kept; of 1 the image is not labelled, of 1 the question"
    )
    assert counts in said and "2 rows without labels: sample 2: its question has no labels" in said
    assert "sample b.png: its image has no labels" in said
    assert "1 of these none that is kept" in check(labelled, "--labels", store)
    assert "2 of these none that is kept" in check(labelled, "labels.threshold=1", "--labels", store)
    assert "labels.proposer is sam" in check(labelled, "--labels", store, "labels.proposer=sam", code=2)
    assert "found none" in check(labelled, "--labels", tmp_path / "none", code=2)


def test_tokens_of_rows_are_counted(tmp_path, vlm_folder):
    long = "lung " * 5000
    path = rows(
        tmp_path, {"id": "1"}, {"id": "2", "answer": "yes"}, {"id": "3", "answer": long}, {"id": "4", "answer": "</s>"}
    )
    said = check(path, "--model", vlm_folder, code=1)
    vlm = load_vlm(vlm_folder, device="cpu")
    limit = vlm.model.config.text_config.max_position_embeddings
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    lengths = sorted(len(prepare(vlm, [picture], ROW["prompt"], answer).input_ids) for answer in (ROW["answer"], "yes"))
    assert (
        f"2 of 4 usable rows fit into {limit:,}, with {lengths[0]} to {lengths[1]}, half of them at most {lengths[0]}; "
        "2 do not 2 rows that the model does not take: sample 3: prompt"
    ) in said
    assert "is a control token of the model" in said
    assert "4 of 4 usable" not in said and "no such folder" in check(path, "--model", "nosuch", code=2)
    assert "expected a file of your own rows" in check(tmp_path, "--model", vlm_folder, code=2)
