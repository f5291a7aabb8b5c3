"""`docs/reproduce.md`, "Table 1 from nothing", walked: its commands, with a Hub of this machine that holds little.

The Hub has the published names, files and layouts, models of tiny widths and data sets of a few questions. SLAKE, which
is no `hf download`, lies there.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner as ClickRunner
from PIL import Image
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.data.rows import read_rows
from a3tune.labels.store import LabelStore
from a3tune.labels.stored import stored_settings
from a3tune.reproduce import grid
from checkpoints import llava_med, llava_med_15
from documents import Block, read_blocks, run_command
from hubs import Hub, ask, serving
from lookups import ROOT
from standins import write_sam, write_slake
from test_biomedclip import checkpoint
from test_biomedclip import save as write_biomedclip
from test_sets import write_parquet

PAGE = "docs/reproduce.md"
QUESTIONS = {"vqa_rad": {"train": 2, "test": 2}, "path_vqa": {"train": 2, "validation": 1, "test": 2}}
"""Rows of the parquet files, by which these data sets are recognised."""
BUDGET = """\
  - training.max_steps=1
  - training.workers=0
  - training.log_steps=1
  - evaluation.max_new_tokens=2
  - 'labels.proposal={min_iou: 0, min_stability: 0, min_side: 0, max_area: 1, max_frame: 1}'
"""
"""Settings after the page's own: short, and an untrained SAM is sure of nothing."""
OUT = Path("runs/paper")


@dataclass
class Walk:
    folder: Path
    said: list[str] = field(default_factory=list)
    """What the commands printed, in their order."""

    def run(self, words: list[str], code: int = 0) -> str:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code and "Traceback" not in result.output, result.output
        return result.output


def scan(seed: int) -> bytes:
    """A light disk on noise, as a PNG."""
    y, x = np.mgrid[:40, :60]
    pixels = np.random.default_rng(seed).integers(0, 90, (40, 60)) + 150 * (np.hypot(y - 20, x - 20 - seed) < 9)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def fill(hub: Hub, folder: Path) -> None:
    """All repositories that the page names, with files beside the ones that are needed."""
    llava_med_15(folder / "med15")
    llava_med(folder / "delta", folder / "llama", folder / "clip")
    write_sam(folder / "sam")
    for name in ("pytorch_model.bin", "tf_model.h5", "preprocessor_config.json"):
        (folder / "sam" / name).write_bytes(b"another form")
    write_biomedclip(folder / "biomedclip", checkpoint(), pickled=True)
    for name, splits in QUESTIONS.items():
        write_parquet(folder / name, {split: [scan(n) for n in range(count)] for split, count in splits.items()})
        (folder / name / "README.md").write_text("---\nlicense: mit\n---\n")
    names = {
        "models/microsoft/llava-med-v1.5-mistral-7b": "med15",
        "models/microsoft/llava-med-7b-delta": "delta",
        "models/huggyllama/llama-7b": "llama",
        "models/openai/clip-vit-large-patch14": "clip",
        "models/facebook/sam-vit-huge": "sam",
        "models/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224": "biomedclip",
        "datasets/flaviagiammarino/vqa-rad": "vqa_rad",
        "datasets/flaviagiammarino/path-vqa": "path_vqa",
    }
    for repository, made in names.items():
        hub.add(repository, folder / made)


def steps() -> Iterator[Block]:
    """The blocks of the walk behind the machine's."""
    lines = (ROOT / PAGE).read_text().splitlines()
    first, last = lines.index("### 3. Models"), lines.index("## On the phantom")
    yield from (block for block in read_blocks(ROOT / PAGE, PAGE) if first < block.line <= last)


def download(words: list[str]) -> None:
    """`hf download ...`, with the Hub's own client."""
    from huggingface_hub.cli.hf import app as client

    command: Any = client
    result = ClickRunner().invoke(command, words)
    assert result.exit_code == 0, (words, result.output, result.exception)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    """Up to the last step, `reproduce`, which is left to the tests."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch, serving() as hub:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "300")
        for module, rows in QUESTIONS.items():
            patch.setattr(f"a3tune.data.sets.{module}._ROWS_ON_HUB", rows)
        fill(hub, tmp_path_factory.mktemp("hub"))
        ask(patch, hub.address, folder / "cache")
        Path("scan.png").write_bytes(scan(0))
        write_slake(Path("downloads/Slake1.0"), Path("scan.png"))
        for block in steps():
            if block.language == "yaml":
                Path("places.yaml").write_text(block.text + BUDGET)
                continue
            for where, words in block.commands():
                if words[0] == "hf":
                    download(words[1:])
                elif words[1] != "reproduce":
                    run_command(where, words[1:])
        assert sorted(path.name for path in Path("models/sam").glob("[!.]*")) == ["config.json", "model.safetensors"]
        yield Walk(folder)


@pytest.fixture(scope="module")
def reproduced(walk: Walk) -> Walk:
    """The page's first `reproduce`, stopped in the middle and called again."""
    commands = [words for block in steps() if block.language == "bash" for _, words in block.commands()]
    command = next(words[1:] for words in commands if words[1] == "reproduce")
    evaluate, calls = grid.evaluate_all, []

    def stopped(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "evaluate_all", stopped)
        walk.said.append(walk.run(command, 130))
    walk.said += [walk.run(command), walk.run(command)]
    return walk


def test_it_ends_in_the_tables(reproduced: Walk):
    table = json.loads((OUT / "table1-llava-med-1.5.json").read_text())
    assert len(table["rows"]) == 23 and len(table["columns"]) == 8
    measured, published = (
        [[cell[whose] is not None for cell in row] for row in table["cells"]] for whose in ("ours", "paper")
    )
    assert measured == [[True] * 6 + [False] * 2] * 23  # IU-Xray VQA and OmniMedVQA have no place
    assert published == [[True] * 8] * 23
    last = (OUT / "table1-llava-med-1.5.md").read_text().split("| A3Tune |")[1].splitlines()[0]
    assert last.endswith("| - (85.97) | - (91.98) |") and "(82.36)" in last and "paper" not in last
    attention = json.loads((OUT / "table2-llava-med-1.5.json").read_text())["cells"]
    assert all(0 <= cell["ours"]["mean"] <= 100 for row in attention for cell in row)


def test_it_learns_from_what_the_places_name(reproduced: Walk):
    for name in ("slake", "vqa-rad", "path-vqa"):
        folder = OUT / "labels" / name
        (settings,) = stored_settings(folder)
        assert (settings.given["weights"], settings.given["ranker"]) == ("models/sam", "models/biomedclip")
        assert (settings.given["proposer"], settings.given["visual_prompt"]) == ("sam", "crop")
        store = LabelStore(folder, settings.name)
        assert all(store.labels(sample, top_k=4) for sample in read_rows(Path("data") / name / "train.jsonl"))
    (run,) = (OUT / "runs").glob("slake-*-a3tune-seed0-*")
    losses = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert losses["loss_align"] > 0


def test_stopped_it_goes_on(reproduced: Walk):
    first, second, third = reproduced.said
    assert "0 of 9 runs were done earlier" in first and "the same command goes on" in first
    assert "4 of 9 runs were done earlier" in second and "9 of 9 runs were done earlier" in third
    assert second[second.index("## table1") :] == third[third.index("## table1") :]


def test_the_first_llava_med_in_its_place(reproduced: Walk):
    places = (
        Path("places.yaml").read_text().replace("llava-med-1.5: models/llava-med-1.5", "llava-med: models/llava-med")
    )
    Path("first.yaml").write_text(places)
    reproduced.run(["reproduce", "table2", "--on", "first.yaml", "--out", "first"])
    table = json.loads(Path("first/table2.json").read_text())
    assert table["comparable"] and all(cell["ours"] for row in table["cells"] for cell in row)


def gone(path: str) -> Callable[[], None]:
    def remove() -> None:
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()

    return remove


def written(old: str, new: str) -> Callable[[], None]:
    def replace() -> None:
        text = Path("places.yaml").read_text()
        assert old in text
        Path("places.yaml").write_text(text.replace(old, new))

    return replace


MISTAKES = {
    "a file of the model": (
        gone("models/llava-med-1.5/tokenizer.json"),
        "models/llava-med-1.5/tokenizer.json: missing",
    ),
    "a model": (gone("models/llava-med-1.5"), "model models/llava-med-1.5: expected 'tiny', or a folder"),
    "a model that is not converted": (
        written("llava-med-1.5: models/llava-med-1.5", "llava-med-1.5: original"),
        "model original: a 'llava_mistral' of the original LLaVA code, which is to be converted once: `a3tune convert",
    ),
    "the segmenter": (gone("models/sam"), "models/sam: expected the folder of a model with a config.json"),
    "no segmenter": (written("  - labels.weights=models/sam\n", ""), "sam: expected the folder of its model"),
    "the ranker": (gone("models/biomedclip"), "models/biomedclip: expected the folder of a ranker"),
    "a split": (
        gone("data/vqa-rad/test.jsonl"),
        "places.yaml: data.vqa-rad: expected train.jsonl and test.jsonl in data/vqa-rad below",
    ),
    "images": (gone("data/vqa-rad/images"), "places.yaml: data.vqa-rad: 2 of the 2 images of data/vqa-rad/train.jsonl"),
    "an image": (
        gone("downloads/Slake1.0/imgs/xmlab2/source.jpg"),
        "places.yaml: data.slake: 1 of the 1 images of data/slake/test.jsonl",
    ),
    "a name": (written("slake: data", "slak: data"), "mimic-cxr, got slak; did you mean slake?"),
    "no names": (written("models: {llava-med-1.5: ", "models: [a, {x: "), "places.yaml: expected YAML"),
    "a list of places": (
        written("{slake: data/slake, vqa-rad: data/vqa-rad, path-vqa: data/path-vqa}", "[data/slake]"),
        "places.yaml: data: expected names with their places (NAME: FOLDER), got ['data/slake']",
    ),
    "a place that is a number": (written("slake: data/slake", "slake: 3"), "data: expected names with their places"),
    "settings that are no list": (
        written("settings:", "settings: a=b\nother:"),
        "places.yaml: expected a mapping with",
    ),
    "a setting": (written("save_steps", "save_step"), "did you mean training.save_steps?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_step_beside_is_told_in_a_line_before_anything_runs(
    name: str, walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    change, message = MISTAKES[name]
    for part in ("models", "data", "downloads", "places.yaml"):
        copy: Any = shutil.copytree if Path(part).is_dir() else shutil.copy
        copy(part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    llava_med_15(tmp_path / "original")
    change()
    there = sorted(tmp_path.rglob("*"))
    said = walk.run(["reproduce", "table1", "--on", "places.yaml", "--model", "llava-med-1.5", "--out", "out"], 2)
    assert message in said and len(said.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_places_are_relative_to_where_one_is(walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places, absolute = walk.folder / "places.yaml", tmp_path / "absolute.yaml"
    monkeypatch.chdir(tmp_path)
    said = walk.run(["reproduce", "table6", "--on", str(places)], 2)
    assert f"in data/slake below {tmp_path}, where you are" in said
    absolute.write_text(places.read_text().replace(": data/", f": {walk.folder}/data/"))
    assert "| train | 2 (paper 4919, -4917.0) |" in walk.run(["reproduce", "table6", "--on", str(absolute)])


def test_what_is_there_is_written_without_models_and_images(reproduced: Walk, tmp_path: Path):
    shutil.copytree(OUT, tmp_path / "paper")
    places = tmp_path / "places.yaml"
    shutil.copytree("data", tmp_path / "data", ignore=shutil.ignore_patterns("images"))
    places.write_text(Path("places.yaml").read_text().replace(": data/", f": {tmp_path}/data/"))
    words = ["reproduce", "table6", "--on", str(places), "--out", str(tmp_path / "paper"), "--jobs", "0"]
    assert "| test | 2 (paper 1061, -1059.0) |" in reproduced.run(words)
