"""Tables as people have them become rows; what cannot be used is left out, and told."""

import csv
import io
import json
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.data.images import load_image
from a3tune.data.importing import Imported, format_import, import_rows
from a3tune.data.importing.splitting import split
from a3tune.data.rows import read_rows
from a3tune.errors import DataError
from a3tune.types import Sample
from hubs import Hub, ask, serving
from rowfiles import written
from test_tables import saved

HEAD = ["file", "patient", "modality", "question", "answer"]


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def png(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(level))
    return path


def table(path: Path, rows: list[list[object]], head: list[str] = HEAD, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        csv.writer(file, **options).writerows([head, *rows])
    return path


def all_rows(done: Imported) -> list[Sample]:
    return [sample for file in done.files.values() for sample in read_rows(file)]


def one_file(source: Path, **options) -> list[Sample]:
    return all_rows(import_rows(source, source.parent / "out", shares=[1], **options))


def questions(folder: Path, patients: int = 10) -> list[list[object]]:
    rows = []
    for number in range(patients * 2):
        png(folder / "scans" / f"{number}.png", number)
        for question, answer in (("Is the liver normal?", "yes"), ("What is shown?", "liver")):
            rows.append([f"scans/{number}.png", f"p{number // 2}", "CT", question, answer])
    return rows


def test_a_spreadsheet_becomes_rows_split_by_patient(tmp_path):
    source = table(tmp_path / "q.csv", questions(tmp_path))
    done = import_rows(source, tmp_path / "out")
    assert done.columns == {
        "file": "image",
        "patient": "patient",
        "modality": "meta.modality",
        "question": "prompt",
        "answer": "answer",
    }
    assert {name: len(samples) for name, samples in done.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    patients = [{sample.meta["patient"] for sample in read_rows(file)} for file in done.files.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10
    first = read_rows(done.files["test"])[0]
    assert (first.prompt, first.answer, first.answer_type) == ("Is the liver normal?", "yes", "closed")
    assert first.meta["modality"] == "CT" and load_image(first.image).size == (6, 4)
    assert (done.read, done.left_out, done.notes) == (40, (), ("split by patient",))
    text = format_import(done)
    assert "40 rows read, 0 left out, 40 written" in text and "meta.modality" in text
    again = import_rows(source, tmp_path / "again")
    assert [sample.id for sample in all_rows(again)] == [sample.id for sample in all_rows(done)]


@pytest.mark.parametrize(
    "options",
    [
        {"delimiter": ";", "encoding": "cp1252"},
        {"delimiter": "\t", "encoding": "utf-16"},
        {"encoding": "utf-8-sig"},
        {"delimiter": "|"},
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path, options):
    png(tmp_path / "a.png")
    source = table(
        tmp_path / "q.csv", [["a.png", "Was zeigt das Bild, präzise?", "Leber"]], ["Bild", "Frage", "x"], **options
    )
    (row,) = one_file(source, columns={"image": "Bild", "question": "Frage", "answer": "x"})
    assert (row.prompt, row.answer) == ("Was zeigt das Bild, präzise?", "Leber")


TALK = [
    {"from": "human", "value": "<image>\nIs there a mass?"},
    {"from": "gpt", "value": "Yes."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "In the liver."},
]
CHAT = [
    {"role": "system", "content": "You are a radiologist."},
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Is there a mass?"}]},
    {"role": "assistant", "content": "Yes."},
]


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"id": "1", "image": "a.png", "conversations": TALK}, 2),
        ({"messages": CHAT[1:], "images": ["a.png"]}, 1),
        ({"messages": CHAT}, 1),
        ({"id": "1", "image": "a.png", "prompt": "Is there a mass?", "answer": "Yes."}, 1),
        ({"id": "1", "image": {"bytes": None, "path": "a.png"}, "question": "Is there a mass?", "answer": "Yes."}, 1),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_conversations_and_rows_in_json_and_parquet(tmp_path, row, count, ending):
    if ending == "parquet" and "messages" in row:  # a column has one type
        row = {"messages": [{"role": "user", "content": "Is there a mass?"}, CHAT[-1]], "images": ["a.png"]}
    source = tmp_path / f"q.{ending}"
    png(tmp_path / "a.png")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), source)
    else:
        written(source, [row])
    rows = one_file(source)
    assert [(item.prompt, item.answer) for item in rows] == [("Is there a mass?", "Yes."), ("Where?", "In the liver.")][
        :count
    ]
    assert len({item.id for item in rows}) == count and {item.image.name for item in rows} == {"a.png"}


@pytest.mark.parametrize(
    "cell",
    [
        f"data:image/png;base64,{b64encode(picture(3)).decode()}",
        b64encode(picture(3) + bytes(900)).decode(),
        {"bytes": picture(3), "path": None},
        [{"bytes": picture(3), "path": "x.png"}],
    ],
)
def test_images_inside_of_a_table_become_files(tmp_path, cell):
    rows = [{"image": cell, "question": f"What is {n}?", "answer": "a liver"} for n in range(2)]
    if isinstance(cell, str):
        source = written(tmp_path / "q.jsonl", rows)
    else:
        source = tmp_path / "q.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    one, other = one_file(source)
    assert one.image == other.image and one.image.parent.name == "images"
    assert load_image(one.image).getpixel((0, 0)) == (3, 3, 3)
    one.image.write_bytes(picture(9))  # imported again, the file holds what its name says
    assert load_image(one_file(source)[0].image).getpixel((0, 0)) == (3, 3, 3)


def test_a_saved_data_set_and_names_of_classes(tmp_path):
    folder = saved(tmp_path, [{"image": {"bytes": picture(1), "path": None}, "question": "q?", "answer": "a"}])
    assert [row.answer for row in all_rows(import_rows(folder, tmp_path / "out", shares=[1]))] == ["a"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    done = import_rows(tmp_path, tmp_path / "again")
    assert list(done.files) == ["train"] and done.notes == ("split as the source says",)
    about = {"info": {"features": {"label": {"names": ["CT", "MR"], "_type": "ClassLabel"}}}}
    labelled = pa.Table.from_pylist(
        [{"image": {"bytes": picture(level), "path": ""}, "label": level} for level in (0, 1)]
    )
    pq.write_table(labelled.replace_schema_metadata({"huggingface": json.dumps(about)}), tmp_path / "c.parquet")
    rows = one_file(tmp_path / "c.parquet", prompt="Which modality?")
    assert [(row.prompt, row.answer) for row in rows] == [("Which modality?", "CT"), ("Which modality?", "MR")]


def test_a_folder_of_images_with_metadata(tmp_path):
    for name, level in (("train", 1), ("test", 2)):
        png(tmp_path / "set" / name / "0.png", level)
        row = {"file_name": "0.png", "caption": "A chest radiograph without a finding."}
        written(tmp_path / "set" / name / "metadata.jsonl", [row])
    done = import_rows(tmp_path / "set", tmp_path / "out", prompt="Write the report.")
    assert list(done.files) == ["train", "test"]
    assert [(row.answer_type, row.prompt) for row in all_rows(done)] == [("report", "Write the report.")] * 2


def test_options_in_columns_and_the_letter_of_the_answer(tmp_path):
    png(tmp_path / "a.png")
    head = ["Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C"]
    rows = [
        ["a.png", "Which modality?", "B", "A: CT", "B: MR", "C: PET"],
        ["a.png", "Which organ?", "Liver", "(a) liver", "(b) spleen", ""],
        ["a.png", "Which side?", "D", "A: left", "B: right", ""],
    ]
    done = import_rows(table(tmp_path / "q.csv", rows, head), tmp_path / "out", shares=[1])
    found = [(row.answer, row.options, row.answer_type) for row in all_rows(done)]
    assert found == [("MR", ("CT", "MR", "PET"), "choice"), ("liver", ("liver", "spleen"), "choice")]
    assert (
        len(done.left_out) == 1 and "q.csv:4: expected an answer that is one of ['left', 'right']" in done.left_out[0]
    )


def test_what_cannot_be_used_is_left_out_with_its_line(tmp_path):
    png(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    rows: list[list[object]] = [
        ["a.png", "p", "CT", "Good?", "yes"],
        ["a.png", "p", "CT", "", "yes"],
        ["a.png", "p", "CT", "What?", " "],
        ["none.png", "p", "CT", "What?", "x"],
        ["https://host/a.png", "p", "CT", "What?", "x"],
        ["broken.png", "p", "CT", "What?", "x"],
        ["a.png", "p", "CT", "Many cells?", "x", "y"],
        ["data:image/png;base64,@@@", "p", "CT", "What?", "x"],
    ]
    done = import_rows(table(tmp_path / "q.csv", rows), tmp_path / "out")
    assert [row.prompt for row in all_rows(done)] == ["Good?"] and done.read == 8
    wanted = ["q.csv:3: no question", "q.csv:4: no answer", "q.csv:5: no such image: 'none.png'; --images DIR"]
    wanted += ["q.csv:6: the image is an address, and nothing is downloaded", "q.csv:8: more cells than the 5 columns"]
    wanted += ["q.csv:9: expected an image in base 64, got <data URI of 25 characters>"]
    lines = done.left_out
    assert [line[: len(start)] for line, start in zip(lines, wanted, strict=False)] == wanted
    assert len(lines) == 7 and "broken.png" in lines[-1] and max(map(len, lines)) < 400
    with pytest.raises(DataError, match=r"(?s)expected rows, none of 1 can be used:.*no such image"):
        import_rows(table(tmp_path / "r.csv", rows[3:4]), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_copies_are_left_out_and_contradictions_told(tmp_path):
    for name in ("a", "copy"):
        png(tmp_path / f"{name}.png", 5)
    rows: list[list[object]] = [
        [f"{name}.png", "p", "CT", "What?", answer] for name, answer in (("a", "x"), ("copy", "x"), ("a", "y"))
    ]
    done = import_rows(table(tmp_path / "q.csv", rows), tmp_path / "out", shares=[1])
    assert [row.answer for row in all_rows(done)] == ["x", "y"]
    assert done.notes[:2] == (
        "1 rows say the same of the same image as another, left out",
        "1 questions of one image have several answers: all are kept",
    )


def test_splits_of_the_source_are_kept_and_leaks_counted(tmp_path):
    for name, level in (("a", 1), ("b", 2), ("c", 1)):
        png(tmp_path / f"{name}.png", level)
    rows: list[list[object]] = [
        [f"{name}.png", place, patient, "What?", "x"]
        for name, place, patient in (("a", "Train", "p"), ("b", "dev", "q"), ("c", "test", "q"), ("a", "final", "p"))
    ]
    head = ["image", "split", "subject_id", "question", "answer"]
    done = import_rows(table(tmp_path / "q.csv", rows, head), tmp_path / "out")
    assert {name: len(samples) for name, samples in done.splits.items()} == {"train": 1, "validation": 1, "test": 1}
    assert done.notes == (
        "split as the source says",
        "1 of 1 images in test are in train, too",
        "1 of 1 patients in test are in validation, too",
    )
    assert "q.csv:5: split: expected one of train" in done.left_out[0]


def test_fields_that_say_who_a_patient_is_are_not_taken(tmp_path):
    rows = questions(tmp_path)
    for number, row in enumerate(rows):
        row += [f"Mustermann {number % 4}", "left" if number % 2 else "right", f"remark {number}"]
    done = import_rows(table(tmp_path / "q.csv", rows, [*HEAD, "PatientName", "side", "note"]), tmp_path / "out")
    assert set(all_rows(done)[0].meta) == {"patient", "modality", "side"}
    assert done.columns["PatientName"] == "left out: it may say who a patient is"
    assert done.columns["note"].startswith("left out: 40 values are too many")
    assert "Mustermann" not in "".join(file.read_text() for file in done.files.values())


def test_text_is_the_question_beside_answers_and_the_answer_alone(tmp_path):
    png(tmp_path / "a.png")
    (asked,) = one_file(table(tmp_path / "q.csv", [["a.png", "What?", "x"]], ["image", "text", "answer"]))
    assert (asked.prompt, asked.answer) == ("What?", "x")
    source = table(tmp_path / "c.csv", [["a.png", "A chest."]], ["image", "text"])
    (told,) = all_rows(import_rows(source, tmp_path / "captions", prompt="What is shown?", shares=[1]))
    assert (told.prompt, told.answer) == ("What is shown?", "A chest.")


def test_one_file_is_split_whatever_its_name(tmp_path):
    rows = [{"image": {"bytes": picture(n), "path": None}, "question": "q?", "answer": "a"} for n in range(10)]
    source = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    assert list(import_rows(source, tmp_path / "out").files) == ["train", "validation", "test"]


def test_an_import_leaves_no_splits_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = table(tmp_path / "q.csv", questions(tmp_path))
    run = CliRunner().invoke
    assert run(app, ["data", "import", str(source), "--out", "out"]).exit_code == 0
    again = run(app, ["data", "import", str(source), "--out", "out", "--split", "1"])
    assert again.exit_code == 2 and "--force" in again.output
    done = run(app, ["data", "import", str(source), "--out", "out", "--split", "1", "--force"])
    assert done.exit_code == 0 and "40 rows read, 0 left out, 40 written" in done.output
    assert [file.name for file in (tmp_path / "out").glob("*.jsonl")] == ["rows.jsonl"]
    shown = run(app, ["data", "check", "out/rows.jsonl"])
    assert shown.exit_code == 0 and "40 rows, 40 usable, 0 not" in shown.output


def test_ids_that_are_there_twice_are_numbered(tmp_path):
    png(tmp_path / "a.png")
    rows: list[list[object]] = [["7", "a.png", f"What {n}?", "x"] for n in range(2)]
    done = import_rows(
        table(tmp_path / "q.csv", rows, ["qid", "image", "question", "answer"]), tmp_path / "out", shares=[1]
    )
    assert [row.id for row in all_rows(done)] == ["1", "2"] and "1 ids were there already" in done.notes[-1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": "Antwort"}, "--map answer=Antwort: .* has no such column, it has file, patient"),
        ({"organ": "modality"}, "--map organ=modality: expected one of image, prompt, answer"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, message):
    source = table(tmp_path / "q.csv", questions(tmp_path, 1))
    with pytest.raises(DataError, match=message):
        import_rows(source, tmp_path / "out", columns=columns)
    with pytest.raises(DataError, match="no column looks like the image; name it with --map image=COLUMN, one of a, b"):
        import_rows(table(tmp_path / "x.csv", [[1, 2]], ["a", "b"]), tmp_path / "out")
    with pytest.raises(
        DataError,
        match=r"--by hospital: expected image, or a column .* \(image, modality, patient\); 4 of 4 rows have no",
    ):
        import_rows(source, tmp_path / "out", by="hospital")


def test_sources_that_are_no_tables(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").touch()
    for name in ("a.csv", "b.csv"):
        table(tmp_path / "two" / name, [["x"]], ["image"])
    written(tmp_path / "odd.json", {"a": [1], "b": 2})
    written(tmp_path / "twice.csv", {})
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    (tmp_path / "keys.jsonl").write_text('{"image": "a", "image": "b"}')
    for name, message in (
        ("none", "it is missing"),
        ("empty", "expected a table .* in this folder, found none"),
        ("a.txt", "expected a table: .csv"),
        ("two", "expected one table, or tables named by split, found 2: a.csv, b.csv"),
        ("odd.json", "expected an array of objects"),
        ("twice.csv", "expected a name for each column, each once"),
        ("keys.jsonl", "keys.jsonl:1: .*the key 'image' is given twice"),
    ):
        with pytest.raises(DataError, match=message):
            import_rows(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_are_looked_for_where_the_user_says(tmp_path):
    png(tmp_path / "scans" / "ct7.png")
    source = table(tmp_path / "tables" / "q.csv", [["ct7", "p", "CT", "What?", "x"], ["a\\b", "p", "CT", "What?", "x"]])
    png(tmp_path / "scans" / "a" / "b.png", 4)
    rows = all_rows(import_rows(source, tmp_path / "out", images=tmp_path / "scans", shares=[1]))
    assert [row.image.resolve() for row in rows] == [tmp_path / "scans" / "ct7.png", tmp_path / "scans" / "a" / "b.png"]


def test_slices_of_one_volume_stay_together(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    import numpy as np

    rows: list[list[object]] = []
    for volume in range(4):
        values = np.random.default_rng(volume).integers(0, 9, (4, 5, 6)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{volume}.nii.gz")
        rows += [[f"{volume}.nii.gz#axial={at}", "What?", "x"] for at in range(6)]
    done = import_rows(
        table(tmp_path / "q.csv", rows, ["image", "question", "answer"]), tmp_path / "out", shares=[0.5, 0, 0.5]
    )
    volumes = [{row.image.name.partition("#")[0] for row in read_rows(file)} for file in done.files.values()]
    assert list(done.files) == ["train", "test"] and not volumes[0] & volumes[1]


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60),
    st.sampled_from([[0.8, 0.1, 0.1], [0.5, 0.5], [0.7, 0, 0.3], [0.98, 0.01, 0.01]]),
)
def test_no_key_is_in_two_parts_and_no_part_is_empty_without_need(keys, shares):
    samples = [Sample(str(at), Path(str(key)), "p", "a", "open") for at, key in enumerate(keys)]
    parts = split(samples, shares, lambda sample: sample.image.name)
    groups = [{sample.image for sample in part} for part in parts.values()]
    assert sum(map(len, parts.values())) == len(samples) and sum(map(len, groups)) == len(set(keys))
    assert len(parts) == sum(share > 0 for share in shares)
    assert all(parts.values()) or len(set(keys)) < len(parts)


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=80), st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet", "xlsx"]))
def test_any_bytes_are_no_rows_or_a_data_error(tmp_path_factory, data, ending):
    path = tmp_path_factory.mktemp("import") / f"q.{ending}"
    path.write_bytes(data)
    with pytest.raises(DataError, match="q"):
        import_rows(path, path.parent / "out")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        ask(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def test_a_data_set_of_the_hub(hub, tmp_path, monkeypatch):
    def rows(level: int) -> bytes:
        return parquet([{"image": {"bytes": picture(level), "path": None}, "question": "Is it?", "answer": "yes"}])

    files = {"README.md": b"# VQA", "make.py": b"boom", "data/train-00000-of-00001-eb88.parquet": rows(1)}
    first = hub.add("datasets/own/vqa", files | {"data/test-00000-of-00001-aa.parquet": rows(2)})
    result = CliRunner().invoke(app, ["data", "import", "own/vqa", "--out", "mine"])
    assert result.exit_code == 0, result.output
    assert f"own/vqa of the Hugging Face Hub at {first}; its files stay in " in result.output
    assert (len(read_rows(Path("mine/train.jsonl"))), len(read_rows(Path("mine/test.jsonl")))) == (1, 1)
    record = json.loads(Path("mine/import.json").read_text())
    assert (record["source"], record["commit"], record["written"]) == ("own/vqa", first, {"train": 1, "test": 1})
    assert not [asked for asked in hub.asked if "README" in asked or "make.py" in asked]
    other = hub.add("datasets/own/vqa", files, "v2")
    ask(monkeypatch, hub.address, tmp_path / "cache", offline=True)  # what is there needs no Hub
    assert list(import_rows(Path("own/vqa"), tmp_path / "again").files) == ["train", "test"]
    with pytest.raises(DataError, match=r"own/vqa@v2: is no folder here, nor in the cache.*--repo-type dataset"):
        import_rows(Path("own/vqa@v2"), tmp_path / "no")
    ask(monkeypatch, hub.address, tmp_path / "cache")
    assert list(import_rows(Path("own/vqa@v2"), tmp_path / "v2").files) == ["train"]
    assert json.loads((tmp_path / "v2/import.json").read_text())["commit"] == other
    assert not (tmp_path / "no").exists()


def test_images_of_the_hub_stay_in_its_cache_and_archives_are_told(hub, tmp_path):
    table = b"file_name,question,answer\nA.PNG,Is it?,yes\nb.png,Is it?,no\n"
    hub.add("datasets/own/files", {"train/metadata.csv": table, "train/A.PNG": picture(1), "imgs.zip": b"PK"})
    done = import_rows(Path("own/files"), tmp_path / "out")
    assert load_image(read_rows(done.files["train"])[0].image).getpixel((0, 0)) == (1, 1, 1)
    assert "not fetched: imgs.zip" in format_import(done) and "no such image: 'b.png'" in done.left_out[0]


def test_a_data_set_that_only_a_script_makes_is_refused(hub, tmp_path):
    hub.add("datasets/own/script", {"script.py": b"boom", "data.zip": b"PK"})
    converted = {"default/train/0000.parquet": parquet([{"image": picture(1), "question": "q?", "answer": "a"}])}
    hub.add("datasets/own/script", converted, "refs/convert/parquet")
    with pytest.raises(
        DataError, match=r"own/script: expected tables in it.*no script is run: own/script@refs/convert"
    ):
        import_rows(Path("own/script"), tmp_path / "out")
    with pytest.raises(DataError, match="has no such data set"):
        import_rows(Path("own/none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(import_rows(Path("own/script@refs/convert/parquet"), tmp_path / "out").files) == ["train"]


def test_several_data_sets_in_a_folder_are_not_mixed(tmp_path):
    png(tmp_path / "set" / "a" / "1.png")
    for name in ("a/train", "a/test", "b/train"):
        table(tmp_path / "set" / f"{name}.csv", [["1.png", "p", "CT", "q?", "a"]])
    with pytest.raises(DataError, match=r"expected one data set, found several: a, b; name one"):
        import_rows(tmp_path / "set", tmp_path / "out")
    assert list(import_rows(tmp_path / "set" / "a", tmp_path / "out").files) == ["train", "test"]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


ASKED = {"image": "a.png", "question": "Is it?", "answer": "yes"}


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("image;question;answer\na.png;Is it?;yes;\n", 0),  # an empty cell at the end of a line
        (",image,question,answer,,\n0,a.png,Is it?,yes,,\n", 3),  # the index of pandas, and columns without a name
        ("sep=;\nimage;question;answer\na.png;Is it?;yes\n", 0),
        ("\ufeffImage,Question,ANSWER\r\nA.PNG,Is it?,yes\r\n", 0),
        ("image,question,answer\ra,Is it?,yes\r", 0),
    ],
)
def test_strange_csv(tmp_path, text, columns):
    png(tmp_path / "a.PNG")
    (tmp_path / "q.csv").write_bytes(text.encode())
    done = import_rows(tmp_path / "q.csv", tmp_path / "out", shares=[1])
    (row,) = all_rows(done)
    assert (row.image.name, row.prompt, row.answer) == ("a.PNG", "Is it?", "yes") and done.left_out == ()
    assert len([name for name in done.columns if name.startswith("column ")]) == columns


def test_names_in_another_case_are_found_if_there_is_one(tmp_path):
    for level, name in enumerate(("a.PNG", "b.png", "B.PNG", "c.JPG", "c.jpg.txt")):
        png(tmp_path / name, level)
    rows = [ASKED | {"image": name} for name in ("A.png", "B.png", "C", "a", "b")]
    done = import_rows(lines(tmp_path / "q.jsonl", *rows), tmp_path / "out", shares=[1])
    assert [row.image.name for row in all_rows(done)] == ["a.PNG", "c.JPG", "b.png"]  # "a" says the same as "A.png"
    assert [line.partition(";")[0] for line in done.left_out] == ["q.jsonl:2: no such image: 'B.png'"]


def test_nothing_is_no_answer(tmp_path):
    png(tmp_path / "a.png")
    rows = [ASKED | {"answer": answer} for answer in (float("nan"), "nan", None, "", 0, False, "None")]
    rows += [ASKED | {"patient": "nan", "ward": float("nan"), "question": "Else?"}]
    done = import_rows(lines(tmp_path / "q.jsonl", *rows), tmp_path / "out", shares=[1])
    assert [row.answer for row in all_rows(done)] == ["0", "no", "None", "yes"]
    assert done.left_out == tuple(f"q.jsonl:{at}: no answer" for at in (1, 2, 3, 4)) and all_rows(done)[-1].meta == {}


def test_a_line_that_is_no_object_is_left_out(tmp_path):
    png(tmp_path / "a.png")
    source = lines(
        tmp_path / "q.jsonl", ASKED, "{broken\n", '{"answer": 1, "answer": 2}\n', '{"question": "\\ud800"}\n'
    )
    done = import_rows(source, tmp_path / "out", shares=[1])
    assert len(all_rows(done)) == 1 and [line[:10] for line in done.left_out] == [f"q.jsonl:{at}:" for at in (2, 3, 4)]
    with pytest.raises(DataError, match=r"q\.jsonl:1: expected one JSON object per line"):
        import_rows(lines(tmp_path / "q.jsonl", "a,b\n", "c,d\n"), tmp_path / "out")


def test_conversations_that_are_none(tmp_path):
    png(tmp_path / "a.png")
    user, system, model = ({"role": role, "content": "x"} for role in ("user", "system", "assistant"))
    talks = [[system], [], None, "x", [user], [model, user], [user, user, model], [user, {"role": "tool"}, model]]
    talks += [[user, model, user, model | {"content": " "}], [system, user, system, model]]
    rows = [{"id": f"{at}", "image": "a.png", "messages": talk} for at, talk in enumerate(talks)]
    done = import_rows(lines(tmp_path / "q.jsonl", *rows), tmp_path / "out", shares=[1])
    assert [row.id for row in all_rows(done)] == ["8-1"]  # the last says the same
    assert len(done.left_out) == 9 and done.left_out[-1] == "q.jsonl:9: turn 2: no answer"


def test_what_a_table_holds_and_is_no_image_is_not_left_behind(tmp_path):
    text = "data:text/html;base64," + b64encode(b"<html>").decode()
    wrong = "data:text/html;base64," + b64encode(picture(5)).decode()  # what it is tells the file, not the label
    done = import_rows(lines(tmp_path / "q.jsonl", *(ASKED | {"image": it} for it in (text, wrong))), tmp_path / "out")
    assert len(done.left_out) == 1 and "its format is not recognised" in done.left_out[0]
    assert [path.suffix for path in (tmp_path / "out" / "images").iterdir()] == [".png"]


def test_what_a_split_is_by_need_not_be_kept(tmp_path):
    """Ids of studies have too many values for results, and numbers of patients are personal: both can split."""
    rows = []
    for number in range(20):
        png(tmp_path / f"{number}.png", number)
        rows.append(ASKED | {"image": f"{number}.png", "study": f"s{number}", "mrn": f"m{number // 4}"})
    for field, groups in (("study", 20), ("mrn", 5)):
        done = import_rows(lines(tmp_path / "q.jsonl", *rows), tmp_path / field, by=field)
        of = {
            name: {rows[int(Path(row.image).stem)][field] for row in read_rows(file)}
            for name, file in done.files.items()
        }
        assert sum(map(len, of.values())) == len(set.union(*of.values())) == groups and len(of) == 3
        assert not any(row.meta for row in all_rows(done)) and f"split by {field}" in done.notes
    with pytest.raises(DataError, match=r"--by study: .*\(image, mrn\); 1 of 20 rows have no study"):
        import_rows(lines(tmp_path / "q.jsonl", *rows[1:], rows[0] | {"study": None}), tmp_path / "no", by="study")
    with pytest.raises(DataError, match="--map: expected one field for a column, image is named for several"):
        import_rows(tmp_path / "q.jsonl", tmp_path / "no", columns={"image": "image", "prompt": "image"})


def test_folders_inside_of_splits(tmp_path):
    """What the outer folder is called counts: it was lost, and the test's images came into the training."""
    for name in ("train/normal", "train/other", "test/normal"):
        png(tmp_path / "set" / name / "I.PNG", len(name))
        lines(tmp_path / "set" / name / "metadata.jsonl", {"file_name": "I.PNG", "question": name, "answer": "yes"})
    done = import_rows(tmp_path / "set", tmp_path / "out")
    assert {name: len(rows) for name, rows in done.splits.items()} == {"train": 2, "test": 1}
    assert {row.prompt.partition("/")[0] for row in done.splits["test"]} == {"test"}


@pytest.mark.parametrize("shares", ["80/10/10", ".8/.1", "nan/1", "-1/1/1", "inf", "a/b", ".7/.2/.1/0", ""])
def test_shares_that_are_none(tmp_path, shares):
    result = CliRunner().invoke(app, ["data", "import", "q.csv", "--out", str(tmp_path / "out"), f"--split={shares}"])
    assert result.exit_code == 2 and "expected one to three shares that sum to 1" in result.output
