"""Changes to what a command works on, between its stop and its going on: what is changed, and what must come of it.

Each works on `Inputs`, wherever they lie, and changes the content of files; most leave every name as it was. Beside the
tests, a fault harness can take `CHANGES` as it is.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file

Outcome = Literal["refused", "as before"]
"""refused: exit code 2, one sentence, nothing in the output touched. as before: goes on, to what it would have made."""


@dataclass(frozen=True)
class Inputs:
    """What a command works on; None where it has none."""

    rows: Path
    """JSONL; its images lie beside it, or in folders there."""
    model: Path | None = None
    """Folder of the base model."""
    adapter: Path | None = None
    store: Path | None = None
    """Label store."""


@dataclass(frozen=True)
class Change:
    command: Literal["train", "eval"]
    outcome: Outcome
    apply: Callable[[Inputs], Inputs | None]
    """Makes the change; returns where the inputs lie if that is another place."""
    says: str = ""
    """Pattern of what a refusal says."""
    needs: str = "rows"
    """Field of `Inputs` that it works on."""
    source: Literal["truth", "weak"] | None = None
    """Of the labels of the training that it is about; None: any."""


def _rows(edit: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Inputs], None]:
    def apply(inputs: Inputs) -> None:
        rows = [json.loads(line) for line in inputs.rows.read_text().splitlines()]
        inputs.rows.write_text("".join(json.dumps(row) + "\n" for row in edit(rows)))

    return apply


def _row(index: int, **fields: Any) -> Callable[[Inputs], None]:
    return _rows(lambda rows: [row | fields if row is rows[index] else row for row in rows])


def _images(inputs: Inputs) -> list[Path]:
    names = dict.fromkeys(json.loads(line)["image"] for line in inputs.rows.read_text().splitlines())
    return [inputs.rows.parent / name for name in names]


def _other_image(path: Path) -> None:
    with Image.open(path) as image:
        other = ImageOps.invert(image.convert("RGB"))
    other.save(path)


def _last_image(inputs: Inputs) -> None:
    _other_image(_images(inputs)[-1])


def _all_images(inputs: Inputs) -> None:
    for path in _images(inputs):
        _other_image(path)


def _image_of_the_same_size_and_time(inputs: Inputs) -> None:
    """One byte of a picture's end, and the time of the file set back."""
    path = _images(inputs)[0]
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def _swap_images(inputs: Inputs) -> None:
    one, *_, other = _images(inputs)
    first, last = one.read_bytes(), other.read_bytes()
    one.write_bytes(last)
    other.write_bytes(first)


def one_value(path: Path) -> None:
    """Change one value in the middle of the largest tensor of a safetensors file."""
    tensors = {name: values.copy() for name, values in load_file(path).items()}
    largest = max(tensors.values(), key=lambda values: values.size)
    largest.reshape(-1)[largest.size // 2 + 1] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})


def _base_value(inputs: Inputs) -> None:
    assert inputs.model is not None
    one_value(inputs.model / "model.safetensors")


def _base_template(inputs: Inputs) -> None:
    assert inputs.model is not None
    path = inputs.model / "chat_template.jinja"
    path.write_text(path.read_text().replace("ASSISTANT", "DOCTOR") + " ")


def _base_settings(inputs: Inputs) -> None:
    assert inputs.model is not None
    path = inputs.model / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05') + "\n")


def _adapter_value(inputs: Inputs) -> None:
    assert inputs.adapter is not None
    one_value(inputs.adapter / "adapter_model.safetensors")


def _adapter_scale(inputs: Inputs) -> None:
    """The same tensors, with another scale."""
    assert inputs.adapter is not None
    path = inputs.adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"lora_alpha": 2 * settings["lora_alpha"]}))


def _relabel(inputs: Inputs) -> None:
    """Other similarities under the same names, as of a ranker that changed its mind."""
    assert inputs.store is not None
    for path in (inputs.store / "similarities").rglob("*.parquet"):
        table = pq.read_table(path)
        other = [list(reversed(values)) for values in table["similarity"].to_pylist()]
        column = pa.array(other, type=table.schema.field("similarity").type)
        pq.write_table(table.set_column(table.schema.get_field_index("similarity"), "similarity", column), path)


def _move(inputs: Inputs) -> Inputs:
    """The same content in other folders, with other times."""
    folder = inputs.rows.parent.with_name("moved")
    shutil.copytree(inputs.rows.parent, folder, copy_function=shutil.copyfile)
    moved = replace(inputs, rows=folder / inputs.rows.name)
    if inputs.model is not None:
        shutil.copytree(inputs.model, folder / "another name", copy_function=shutil.copyfile)
        moved = replace(moved, model=folder / "another name")
    return moved


_SHIFTED = [{"box": [1.0, 2.0, 9.0, 7.0]}]
_REWRITTEN = _rows(lambda rows: [dict(reversed(row.items())) for row in rows])
_FEWER = _rows(lambda rows: rows[:-1])
_REVERSED = _rows(lambda rows: rows[::-1])
_MORE = _rows(lambda rows: [*rows, rows[0] | {"id": "one more"}])


def _touch(inputs: Inputs) -> None:
    for path in _images(inputs):
        path.touch()


CHANGES: dict[str, Change] = {
    "train: an answer": Change("train", "refused", _row(1, answer="a lung"), "the answer of row 2"),
    "train: a question": Change("train", "refused", _row(0, prompt="And now?"), "the prompt of row 1"),
    "train: the order of rows": Change("train", "refused", _REVERSED, "rows are in another order"),
    "train: a row less": Change("train", "refused", _FEWER, r"had \d+ rows, there are \d+ now"),
    "train: a row more": Change("train", "refused", _MORE, r"had \d+ rows, there are \d+ now"),
    "train: a true region": Change(
        "train", "refused", _row(0, regions=_SHIFTED), "the regions of row 1", source="truth"
    ),
    "train: an image": Change("train", "refused", _last_image, "the image of row"),
    "train: all images": Change("train", "refused", _all_images, "the image of row 1"),
    "train: images change places": Change("train", "refused", _swap_images, "the image of row 1"),
    "train: an image of the same size and time": Change(
        "train", "refused", _image_of_the_same_size_and_time, "the image of row 1"
    ),
    "train: one value of the base": Change("train", "refused", _base_value, "base model model.safetensors", "model"),
    "train: the template of the base": Change("train", "refused", _base_template, "base model chat_template", "model"),
    "train: the settings of the base": Change("train", "refused", _base_settings, "base model config.json", "model"),
    "train: labels made anew": Change("train", "refused", _relabel, "the labels of row", "store", "weak"),
    "train: everything moved": Change("train", "as before", _move),
    "train: rows written in another way": Change("train", "as before", _REWRITTEN),
    "train: images of another time": Change("train", "as before", _touch),
    "train: what is not learnt from": Change("train", "as before", _row(0, meta={"organ": "liver"}, id="renamed")),
    "train: regions that are not learnt from": Change("train", "as before", _row(0, regions=_SHIFTED), source="weak"),
    "eval: an answer": Change("eval", "refused", _row(0, answer="a lung"), "the answer of sample"),
    "eval: a question": Change("eval", "refused", _row(0, prompt="And now?"), "the prompt of sample"),
    "eval: a true region": Change("eval", "refused", _row(0, regions=_SHIFTED), "the regions of sample"),
    "eval: what results are broken down by": Change("eval", "refused", _row(0, meta={"organ": "eye"}), "the meta of"),
    "eval: a row less": Change("eval", "refused", _FEWER, "is not among those"),
    "eval: an image": Change("eval", "refused", _last_image, "the image of sample"),
    "eval: all images": Change("eval", "refused", _all_images, "the image of sample"),
    "eval: an image of the same size and time": Change(
        "eval", "refused", _image_of_the_same_size_and_time, "the image of sample"
    ),
    "eval: one value of the base": Change("eval", "refused", _base_value, "base model model.safetensors", "model"),
    "eval: the template of the base": Change("eval", "refused", _base_template, "base model chat_template", "model"),
    "eval: one value of the adapter": Change("eval", "refused", _adapter_value, "weights of the model", "adapter"),
    "eval: the scale of the adapter": Change("eval", "refused", _adapter_scale, "weights of the model", "adapter"),
    "eval: everything moved": Change("eval", "as before", _move),
    "eval: rows in another order": Change("eval", "as before", _REVERSED),
}
"""What is changed -> how, and what must come of it."""
