"""Damaged rows, tables and settings: read or refused with an error of ours, soon."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from a3tune.config import RunConfig, dump_config, load_config
from a3tune.convert.stream import open_checkpoint
from a3tune.data.annotations import attach_regions
from a3tune.data.annotations.values import read_names
from a3tune.data.images import content_hash, load_image
from a3tune.data.rows import read_rows, write_rows
from a3tune.errors import A3TuneError
from a3tune.evaluation.predictions import read_predictions
from a3tune.masks import encode_mask, region_mask
from a3tune.models import read_config
from a3tune.run.folder import RunFolder
from fuzzing import altered, damaged, fuzz, lines, only_our_errors

RLE = encode_mask(np.eye(6, 8, dtype=bool))
ROWS = [
    {"id": "1", "image": "a.png", "prompt": "Where is the liver?", "answer": "left lung"},
    {
        "id": "2",
        "image": "b.png",
        "prompt": "Is it the spleen?",
        "answer": "yes",
        "answer_type": "closed",
        "regions": [{"rle": {"size": [6, 8], "counts": RLE.counts}, "name": "x"}, {"box": [0, 0, 2.5, 3]}],
        "meta": {"modality": "CT", "age": 7},
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 6), 9).save(folder / name)
    return folder


def used(path: Path) -> None:
    """Read rows, and all that is done with them before a model sees them; then write them and read them again."""
    samples = read_rows(path)
    for sample in samples:
        with only_our_errors():
            content_hash(sample.image)
            size = load_image(sample.image).size
            for region in sample.regions or ():
                region_mask(region, size[1], size[0])
    write_rows(path.with_suffix(".again.jsonl"), samples)
    again = read_rows(path.with_suffix(".again.jsonl"))
    assert [(row.id, row.prompt, row.regions) for row in again] == [
        (row.id, row.prompt, row.regions) for row in samples
    ]


@fuzz
@given(damaged([lines(ROWS)]) | st.lists(altered(ROWS), max_size=3).map(lines))
def test_rows(folder, data):
    (folder / "rows.jsonl").write_bytes(data)
    with only_our_errors():
        used(folder / "rows.jsonl")


@fuzz
@given(st.sampled_from(["[", '{"a":', '[{"a":']), st.sampled_from([200, 100_000]))
def test_deep_json(folder, opening, depth):
    """Python's reader gives up with RecursionError."""
    deep = folder / "deep"
    deep.mkdir(exist_ok=True)
    for name in ("rows.jsonl", "a3tune.json", "predictions.jsonl", "config.json", "state.json", "dataset_info.json"):
        (deep / name).write_text(opening * depth + "\n")
    for read in (
        lambda: read_rows(deep / "rows.jsonl"),
        lambda: attach_regions([], deep / "rows.jsonl"),
        lambda: read_names(deep / "config.json"),
        lambda: read_rows(deep),
        lambda: RunFolder.open(deep),
        lambda: read_predictions(RunFolder(deep)),
        lambda: open_checkpoint(deep),
        lambda: read_config(deep),
    ):
        with pytest.raises(A3TuneError):
            read()


def table(rows: list[dict], **options) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


IMAGE = io.BytesIO()
Image.new("L", (8, 6), 9).save(IMAGE, "PNG")
CHAT = [
    {
        "messages": [{"role": "user", "content": f"Where {number}?"}, {"role": "assistant", "content": "left"}],
        "images": [{"bytes": IMAGE.getvalue(), "path": None}],
    }
    for number in range(2)
]
TABLES = [
    table(CHAT),
    table(ROWS),
    table(ROWS, compression="zstd"),
    table(ROWS, compression="gzip", use_dictionary=False),
]


def arrow(rows: list[dict], **options) -> bytes:
    rows_of = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, rows_of.schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(rows_of)
    return sink.getvalue()


@fuzz
@given(damaged(TABLES))
def test_parquet(folder, data):
    (folder / "rows.parquet").write_bytes(data)
    with only_our_errors():
        used(folder / "rows.parquet")


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}


@fuzz
@given(damaged([arrow(CHAT), arrow(ROWS), arrow(ROWS, compression="zstd")]), st.just(STATE) | altered([STATE]))
def test_saved_data_sets(folder, data, state):
    saved = folder / "saved"
    saved.mkdir(exist_ok=True)
    (saved / "dataset_info.json").write_text("{}")
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "data-00000-of-00001.arrow").write_bytes(data)
    with only_our_errors():
        used(saved)


# Settings

YAML = [
    dump_config(RunConfig()).encode(),
    b"labels:\n  top_k: 2\n  proposal: {min_area: 0.001}\noutput: runs/x\n",
    b"a: &a [1, 2]\nlabels: {proposal: *a}\n",
]


@fuzz
@given(damaged(YAML) | altered([yaml.safe_load(data) for data in YAML]).map(lambda tree: json.dumps(tree).encode()))
def test_settings(folder, data):
    (folder / "run.yaml").write_bytes(data)
    with only_our_errors():
        config = load_config(folder / "run.yaml")
        (folder / "again.yaml").write_text(dump_config(config))
        assert load_config(folder / "again.yaml") == config


_KEYS = [
    "labels.top_k",
    "labels.query",
    "alignment.heads",
    "evaluation.weights",
    "labels.proposal.x",
    "model",
    "output",
]


@fuzz
@given(
    st.sampled_from(_KEYS) | st.text(st.sampled_from("labels.model=?&*!|>'\"{}[]:,\n"), max_size=12),
    st.text(st.sampled_from("0123456789.-+einfa&*!<>|{}[]:,?'\"\n \x00"), max_size=12) | st.text(max_size=6),
)
def test_overrides(key, value):
    with only_our_errors():
        dump_config(load_config(None, [f"{key}={value}"]))


@pytest.mark.parametrize("end", ["labels: {proposal: *a9}", "*a9: 1", "output: *a9", "x: *a9"])
def test_settings_that_unfold_without_end(folder, end):
    """Ten to the ninth references to one text: small in memory, endless in a message."""
    levels = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10))
    (folder / "bomb.yaml").write_text(f"a0: &a0 x\n{levels}{end}\n")
    with only_our_errors():
        load_config(folder / "bomb.yaml")


@pytest.mark.parametrize(
    "text", ["&a [*a]", "a: &a\n  b: *a", "labels: &a {proposal: *a}", "? [1, 2]\n: 3", "? {a: 1}\n: 3"]
)
def test_settings_that_hold_themselves(folder, text):
    (folder / "round.yaml").write_text(text)
    with only_our_errors():
        load_config(folder / "round.yaml")
