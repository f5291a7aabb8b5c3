import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from a3tune.data.checking import check_rows, format_rows_check
from a3tune.errors import DataError
from a3tune.masks import encode_mask

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
