import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from a3tune.config import DataConfig
from a3tune.data.rows import ANSWER_TYPES, check_split, read_rows, write_rows
from a3tune.errors import DataError, OutputError
from a3tune.machine.files import unfinished
from a3tune.types import Region, Rle, Sample

ROW = {"id": "1", "image": "a.png", "prompt": "Where is it?", "answer": "left lung"}
RLE = {"size": [3, 4], "counts": "04"}


def read(tmp_path: Path, *rows: object, name: str = "rows.jsonl") -> list[Sample]:
    path = tmp_path / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_rows(path)


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
number = st.floats(-1e6, 1e6)
regions = st.one_of(
    st.builds(
        lambda x, y, w, h, name: Region(box=(x, y, x + w, y + h), name=name),
        *[st.integers(-9, 99).map(float)] * 2,
        *[st.integers(1, 99).map(float)] * 2,
        st.text(st.characters(codec="utf-8"), max_size=5),
    ),
    st.builds(lambda size, counts: Region(mask=Rle(size, counts)), st.tuples(*[st.integers(1, 99)] * 2), text),
)
samples = st.lists(
    st.builds(
        Sample,
        id=text,
        image=st.from_regex(r"[a-z]{1,5}(/[a-z]{1,5})?\.png", fullmatch=True).map(Path),
        prompt=text,
        answer=text,
        answer_type=st.sampled_from(ANSWER_TYPES),
        regions=st.none() | st.lists(regions, max_size=2).map(tuple),
        meta=st.dictionaries(text, text, max_size=2),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda sample: sample.id,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples)
def test_rows_survive_writing_and_reading(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    placed = [
        replace(
            row,
            image=folder / str(row.image),
            options=tuple({row.answer: 0, "other": 0, "another": 0}) if row.answer_type == "choice" else (),
        )
        for row in rows
    ]
    write_rows(folder / "rows.jsonl", placed)
    assert read_rows(folder / "rows.jsonl") == placed
    assert [file.name for file in folder.iterdir()] == ["rows.jsonl"]


def test_images_are_relative_to_the_file_and_the_folder_can_move(tmp_path):
    sample = Sample("1", tmp_path / "data" / "images" / "a.png", "p", "a", "open")
    write_rows(tmp_path / "data" / "rows.jsonl", [sample])
    assert json.loads((tmp_path / "data" / "rows.jsonl").read_text())["image"] == "images/a.png"
    (tmp_path / "data").rename(tmp_path / "moved")
    assert read_rows(tmp_path / "moved" / "rows.jsonl")[0].image == tmp_path / "moved" / "images" / "a.png"


def test_defaults(tmp_path):
    first, second, third, choice, fourth = read(
        tmp_path,
        ROW,
        "",
        ROW | {"id": "2", "answer": "Yes.", "regions": None},
        ROW | {"id": "3", "answer": "no", "answer_type": "open", "regions": []},
        ROW | {"id": "5", "options": ["left lung", "liver"]},
        ROW | {"id": "4", "meta": {"organ": "liver", "age": 70, "dose": 1.5}, "image": "/data/x.png"},
    )
    assert (first.answer_type, first.regions, first.meta) == ("open", None, {})
    assert (second.answer_type, second.regions) == ("closed", None)
    assert (third.answer_type, third.regions) == ("open", ())
    assert (choice.answer_type, choice.options) == ("choice", ("left lung", "liver"))
    assert fourth.meta == {"organ": "liver", "age": "70", "dose": "1.5"}
    assert fourth.image == Path("/data/x.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "JSON object per line"),
        ("[1]", "expected an object"),
        ('{"id": NaN}', "NaN"),
        ('{"id": "1", "answer": "yes", "answer": "no"}', "the key 'answer' is given twice in one object"),
        (ROW | {"promt": "x"}, "unknown field 'promt'; did you mean 'prompt'?"),
        (ROW | {"zzz": "x"}, "the fields are id, image"),
        ({"id": "1"}, "answer: expected a text, the field is missing"),
        (ROW | {"prompt": " "}, "prompt: expected a text that is not empty"),
        (ROW | {"answer": ""}, "answer: expected a text that is not empty"),
        (ROW | {"id": 7}, "id: expected a text that is not empty, got 7"),
        (ROW | {"image": None}, "image: expected a text"),
        (ROW | {"answer_type": "opne"}, "answer_type: expected one of open, closed, choice, report, got 'opne'"),
        (ROW | {"answer_type": []}, "answer_type"),
        (ROW | {"options": ["left lung"]}, "options: expected a list of two texts or more"),
        (ROW | {"options": ["left lung", " "]}, "options: expected a list of two texts or more"),
        (ROW | {"options": ["Left lung", "liver"]}, "answer: expected one of the options, word for word, got 'left lu"),
        (ROW | {"options": ["left lung", "liver"], "answer_type": "open"}, "options: expected them only with"),
        (ROW | {"meta": []}, "meta: expected an object"),
        (ROW | {"meta": {"a": None}}, "meta.a: expected a text or a number"),
        (ROW | {"meta": {"a": True}}, "meta.a"),
        (ROW | {"regions": {}}, "regions: expected a list"),
        (ROW | {"regions": [{}]}, "regions[0]: expected either 'rle' or 'box', got neither"),
        (ROW | {"regions": [{"box": [0, 0, 1, 1]}, {"box": [0, 0, 1, 1], "rle": RLE}]}, "regions[1]: expected either"),
        (ROW | {"regions": [{"bbox": [0, 0, 1, 1]}]}, "regions[0]: unknown field 'bbox'; did you mean 'box'?"),
        (ROW | {"regions": [{"box": [0, 0, 1]}]}, "box: expected four numbers"),
        (ROW | {"regions": [{"box": [0, 0, 1, "1"]}]}, "box: expected four numbers"),
        (ROW | {"regions": [{"box": [5, 0, 5, 1]}]}, "box: expected x0 < x1"),
        (ROW | {"regions": [{"box": [0.1, 0.2, 0.5, 1]}]}, "box: expected pixels of the image, not shares"),
        (ROW | {"regions": [{"box": [0, 0, 1, 1], "name": 3}]}, "name: expected a text"),
        (ROW | {"regions": [{"rle": {"size": [0, 4], "counts": ""}}]}, "rle.size: expected [height, width]"),
        (ROW | {"regions": [{"rle": {"size": [3, 4], "counts": [12]}}]}, "rle.counts: expected COCO's compressed text"),
        (ROW | {"regions": [{"rle": {"sise": [3, 4]}}]}, "did you mean 'size'?"),
        (ROW | {"id": "0"}, "id: expected a unique text, '0' is also on line 1"),
    ],
)
def test_an_error_names_file_line_field_and_what_was_expected(tmp_path, row, message):
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*" + re.escape(message)):
        read(tmp_path, ROW | {"id": "0"}, row)


def test_files_that_are_no_rows(tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        read_rows(tmp_path / "missing.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary\.jsonl: expected UTF-8"):
        read_rows(tmp_path / "binary.jsonl")
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode())
    assert len(read_rows(tmp_path / "bom.jsonl")) == 1


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        read_rows(path)


def test_no_row_is_an_error(tmp_path):
    for lines in ("", "\n \n"):
        (tmp_path / "rows.jsonl").write_text(lines)
        for read_them in (lambda path: read_rows(path), lambda path: check_split(DataConfig(train=path), "train")):
            with pytest.raises(DataError, match=r"rows\.jsonl: expected at least one row, it has none$"):
                read_them(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("data:image/png;base64," + 9999 * "iVBOR", "image itself: <data URI of 50,017 characters>; `a3tune data im"),
        ("https://host/a.png", "an address: 'https://host/a.png'; `a3tune data import` .* nothing is downloaded"),
        (9999 * "iVBOR", "expected the path of a file, got 49,995 characters: <49,995 characters>"),
    ],
)
def test_images_that_are_no_files_are_refused_in_a_short_line(tmp_path, image, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, ROW | {"image": image})
    assert len(str(caught.value)) < 400
    assert "iVBOR" not in str(caught.value)


def test_forms_that_are_imported(tmp_path):
    with pytest.raises(DataError, match="`a3tune data import` makes rows of other forms"):
        read(tmp_path, {"id": "1", "image": "a.png", "conversations": []})
    for text in ("[", "[\n" + json.dumps(ROW) + "\n]"):
        with pytest.raises(DataError, match="`a3tune data import` makes rows of a JSON array"):
            read(tmp_path, text)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    good = Sample("1", tmp_path / "a.png", "p", "a", "open")
    path = tmp_path / "rows.jsonl"
    write_rows(path, [good])
    before = path.read_bytes()
    nan = Region(box=(0.0, 0.0, float("nan"), 1.0))
    for bad in (
        [good, good],
        [Sample("2", b"png", "p", "a", "open")],
        [Sample("2", good.image, "p", "", "open")],
        [Sample("2", good.image, "p", "a", "open", (nan,))],
    ):
        with pytest.raises(DataError):
            write_rows(path, bad)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "rows.jsonl"
    sample = Sample("1", tmp_path / "a.png", "p", "a", "open")
    write_rows(path, [sample])
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, full)
    with pytest.raises(OutputError, match=r"rows\.jsonl: cannot be written: No space left"):
        write_rows(path, [sample, Sample("2", tmp_path / "b.png", "p", "a", "open")])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_in_the_place_of_the_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    unfinished(tmp_path / "rows.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="cannot be written"):
        write_rows(tmp_path / "rows.jsonl", [Sample("1", tmp_path / "a.png", "p", "a", "open")])
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["rows.jsonl", "blank.jsonl", "rows.parquet"])
def test_a_file_without_rows_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pa.table({"id": pa.array([], pa.string())}), path)
    else:
        path.write_text("" if name == "rows.jsonl" else " \n\n")
    with pytest.raises(DataError, match=f"{name}: expected at least one row, it has none"):
        read_rows(path)
    with pytest.raises(DataError, match=f"{name}: expected at least one row, it has none"):
        check_split(DataConfig(train=path), "train")
