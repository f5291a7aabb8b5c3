"""A mistake is told at once: before PyTorch, transformers or PEFT are imported, whatever the command."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from typer.main import get_command

from a3tune.cli import app
from mistakes import MISTAKES, scene

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


@pytest.mark.parametrize("command", BY_COMMAND)
def test_mistakes_are_told_at_once_and_touch_nothing(command: str, folder: Path):
    before = sorted(folder.rglob("*"))
    calls = json.dumps([MISTAKES[name][0] for name in BY_COMMAND[command]])
    environment = os.environ | {"COLUMNS": "300", "OMP_NUM_THREADS": "1"}
    interpreter = [sys.executable, "-c", CODE]
    told = subprocess.check_output(interpreter, input=calls, cwd=folder, text=True, env=environment)
    found = json.loads(told)
    for name, (code, said, loaded, _) in zip(BY_COMMAND[command], found, strict=True):
        assert (code, loaded) == (2, []), f"{name}: {said}"
        assert MISTAKES[name][1] in said, name
    assert found[0][3] < MOST
    assert sorted(folder.rglob("*")) == before


def test_every_command_has_mistakes():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {name.split()[0] for name in BY_COMMAND} - {"no"} == set(commands)
