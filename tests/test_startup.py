"""A mistake is told at once: before PyTorch, transformers or PEFT are imported, whatever the command."""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.main import get_command

from a3tune.cli import app
from mistakes import MISTAKES, NO_HUB, ROWS, scene

HEAVY = ("torch", "transformers", "peft", "accelerate", "scipy", "matplotlib", "skimage", "gradio")
MOST = 2.5
"""Seconds of processor time for the first mistake of a process, Python's own start included; less than 1 when quiet."""
CODE = f"""
import json, sys, time
from typer.testing import CliRunner
from a3tune.cli import app
found = []
for arguments in json.load(sys.stdin):
    said = CliRunner().invoke(app, arguments)
    loaded = [name for name in {HEAVY} if name in sys.modules]
    found.append([said.exit_code, said.output, loaded, time.process_time()])
print(json.dumps(found))
"""
BY_COMMAND: dict[str, list[str]] = defaultdict(list)
for name in MISTAKES:
    BY_COMMAND[name.split(":")[0]].append(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    scene(folder)
    return folder


def tell(calls: list[Sequence[str]], folder: Path) -> list[tuple[int, str, list[str], float]]:
    """What commands in one new process end with and say, what it has loaded then, and its processor time so far."""
    interpreter = [sys.executable, "-c", CODE]
    environment = os.environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"} | NO_HUB
    said = subprocess.check_output(interpreter, input=json.dumps(calls), cwd=folder, text=True, env=environment)
    return [tuple(found) for found in json.loads(said)]


@pytest.mark.parametrize("command", BY_COMMAND)
def test_mistakes_are_told_at_once_and_touch_nothing(command: str, folder: Path):
    before = sorted(folder.rglob("*"))
    found = tell([MISTAKES[name][0] for name in BY_COMMAND[command]], folder)
    for name, (code, said, loaded, _) in zip(BY_COMMAND[command], found, strict=True):
        assert (code, loaded) == (2, []), f"{name}: {said}"
        assert MISTAKES[name][1] in said, name
    assert found[0][3] < MOST
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["compare", "first", "second", "--by", "modality"],
        ["report", "first", "--out", "page.html"],
        ["label", "status", "store"],
        ["label", "export", "store", ROWS, "--out", "coco.json"],
        ["data", "check", ROWS],
        ["data", "import", ROWS, "--out", "imported"],
        ["data", "regions", ROWS, "--masks", "masks.json", "--out", "regions.jsonl"],
    ],
)
def test_what_only_reads_needs_no_model(arguments: list[str], folder: Path, tmp_path: Path):
    scene = tmp_path / "scene"
    shutil.copytree(folder, scene)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    image = {"id": 1, "file_name": "scan.png", "width": 8, "height": 8}
    masks = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "lesion"}]}
    (scene / "masks.json").write_text(json.dumps(masks))
    ((code, said, loaded, _),) = tell([arguments], scene)
    assert code == 0, said
    assert not {"torch", "transformers", "peft"} & set(loaded)


def test_every_command_has_mistakes():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {name.split()[0] for name in BY_COMMAND} - {"no"} == set(commands)
