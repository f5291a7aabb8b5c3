import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from a3tune.data.images import load_image
from a3tune.data.rows import read_rows, write_rows
from a3tune.data.tables import table_rows
from a3tune.errors import DataError
from a3tune.types import Region, Rle, Sample


def png(level: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (3, 2), level).save(buffer, "PNG")
    return buffer.getvalue()


def chat(prompt: object, answer: object) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


IMAGE = {"bytes": png(), "path": "a.png"}
ROW = {"messages": chat("<image>\nWhere is it?", "left lung"), "images": [IMAGE]}


def parquet(tmp_path: Path, *rows: dict, name: str = "rows.parquet") -> Path:
    path = tmp_path / name
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def saved(tmp_path: Path, *shards: list[dict]) -> Path:
    """A folder as `Dataset.save_to_disk` writes it."""
    folder = tmp_path / "train"
    folder.mkdir()
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_conversations_with_the_bytes_of_their_image(tmp_path):
    parts = chat(
        [{"type": "image", "text": None}, {"type": "text", "text": "Is it big?"}], [{"type": "text", "text": "Yes"}]
    )
    first = read_rows(parquet(tmp_path, ROW, ROW))
    assert first[0] == Sample("rows-1", png(), "Where is it?", "left lung", "open")
    assert [sample.id for sample in first] == ["rows-1", "rows-2"]
    second = read_rows(parquet(tmp_path, {"messages": parts, "image": IMAGE}, name="two.parquet"))
    assert second == [Sample("two-1", png(), "Is it big?", "Yes", "closed")]
    assert load_image(first[0].image).size == (3, 2)


def test_images_by_path_are_relative_to_the_file(tmp_path):
    paths = ({"bytes": None, "path": "images/a.png"}, "images/a.png")
    for number, image in enumerate(paths):
        sample = read_rows(parquet(tmp_path, ROW | {"images": [image]}, name=f"{number}.parquet"))[0]
        assert sample.image == tmp_path / "images" / "a.png"


def test_public_fields_beside_the_conversation(tmp_path):
    row = ROW | {
        "id": "q7",
        "answer_type": "choice",
        "meta": {"organ": "lung", "age": 70},
        "regions": [
            {"box": [0.0, 1.0, 2.0, 3.0], "rle": None, "name": "lung"},
            {"box": None, "rle": {"size": [2, 3], "counts": "06"}, "name": None},
        ],
    }
    other = ROW | {"id": "q8", "answer_type": None, "meta": None, "regions": None}
    samples = read_rows(parquet(tmp_path, row, other))
    regions = (Region(box=(0, 1, 2, 3), name="lung"), Region(mask=Rle((2, 3), "06")))
    assert samples[0] == Sample(
        "q7", png(), "Where is it?", "left lung", "choice", regions, {"organ": "lung", "age": "70"}
    )
    assert samples[1] == Sample("q8", png(), "Where is it?", "left lung", "open")


def test_meta_as_an_arrow_map_and_empty_regions(tmp_path):
    table = pa.table(
        {
            "id": ["1"],
            "image": ["a.png"],
            "prompt": ["p"],
            "answer": ["no"],
            "regions": pa.array([[]], pa.list_(pa.struct({"box": pa.list_(pa.float64())}))),
            "meta": pa.array([[("modality", "CT")]], pa.map_(pa.string(), pa.string())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [
        Sample("1", tmp_path / "a.png", "p", "no", "closed", (), {"modality": "CT"})
    ]


def test_a_folder_of_save_to_disk_in_the_order_of_its_shards(tmp_path):
    folder = saved(tmp_path, [ROW | {"id": "b"}, ROW | {"id": "a"}], [ROW | {"id": "0", "images": ["x.png"]} | {}])
    samples = read_rows(folder)
    assert [sample.id for sample in samples] == ["b", "a", "0"]
    assert samples[2].image == folder / "x.png"


def test_what_was_read_can_be_written_as_rows(tmp_path):
    samples = read_rows(parquet(tmp_path, ROW | {"images": ["a.png"]}))
    write_rows(tmp_path / "rows.jsonl", samples)
    assert read_rows(tmp_path / "rows.jsonl") == samples
    with pytest.raises(DataError, match="`a3tune data import` writes images as files"):
        write_rows(tmp_path / "rows.jsonl", read_rows(parquet(tmp_path, ROW)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"messages": chat("q", "a") * 2}, "messages: expected one user and one assistant message"),
        (ROW | {"messages": chat("q", "a")[::-1]}, "got the roles ['assistant', 'user']"),
        (ROW | {"messages": None}, "messages: expected one user"),
        (ROW | {"images": []}, "images: expected a list of one image, got 0"),
        (ROW | {"images": [IMAGE, IMAGE]}, "images: expected a list of one image, got 2"),
        (ROW | {"images": [{"bytes": None, "path": None}]}, "image: expected a path or the bytes"),
        (ROW | {"images": [{"bytes": b"", "path": ""}]}, "image: expected a path or the bytes"),
        (ROW | {"messages": chat("<image>", "a")}, "prompt: expected a text that is not empty"),
        (ROW | {"messages": chat("q", " ")}, "answer: expected a text that is not empty"),
        (ROW | {"messages": chat(7, 7)}, "messages: expected a text or a list of parts"),
        (ROW | {"answer_type": "opne"}, "answer_type: expected one of"),
        (ROW | {"modality": "CT"}, "unknown field 'modality'"),
        (ROW | {"regions": [{"box": [5.0, 0.0, 1.0, 1.0]}]}, "box: expected x0 < x1"),
        ({"question": "q", "answer": "a", "image": "a.png"}, "unknown field 'question'"),
    ],
)
def test_an_error_names_file_row_field_and_what_was_expected(tmp_path, row, message):
    path = parquet(tmp_path, row)
    with pytest.raises(DataError, match=re.escape(f"{path}:1: ") + ".*" + re.escape(message)):
        read_rows(path)


def test_ids_are_unique(tmp_path):
    path = parquet(tmp_path, *[ROW | {"id": "same"}] * 2)
    with pytest.raises(DataError, match=r"rows\.parquet:2: id: expected a unique text, 'same' is also on row 1"):
        read_rows(path)


def test_files_and_folders_that_are_no_tables(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "empty.parquet").touch()
    folder = saved(tmp_path, [ROW])
    shard = folder / "data-00000-of-00001.arrow"
    whole = shard.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"nothing"):
        shard.write_bytes(data)
        with pytest.raises(DataError, match="train: expected a complete"):
            read_rows(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../rows.parquet"}]}))
    with pytest.raises(DataError, match="names of files in this folder"):
        read_rows(folder)
    (folder / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json: expected the list of arrow files"):
        read_rows(folder)
    (folder / "state.json").unlink()
    for path in ("a.parquet", "empty.parquet", "none.parquet", "train"):
        with pytest.raises(DataError, match=path):
            read_rows(tmp_path / path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="name one of train"):
        read_rows(tmp_path)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_parquet_is_a_data_error(tmp_path_factory, data):
    path = parquet(tmp_path_factory.mktemp("rows"), ROW, ROW)
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        list(table_rows(path))
    except DataError as error:
        assert "rows.parquet" in str(error)
