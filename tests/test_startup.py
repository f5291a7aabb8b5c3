"""A mistake is told at once: before PyTorch, transformers or PEFT are imported, whatever the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mistakes import MISTAKES, scene
from typer.main import get_command

from a3tune.cli import app

HEAVY = ("torch", "transformers", "peft", "accelerate", "matplotlib", "skimage", "gradio")
MOST = 2.5
"""Seconds of processor time; each takes less than 1 on a quiet machine."""
CODE = f"""
import atexit, json, sys, time
def told():
    loaded = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps({{"loaded": loaded, "seconds": time.process_time()}}), file=sys.stderr)
atexit.register(told)
from a3tune.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    scene(folder)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_once(name: str, folder: Path):
    arguments, message = MISTAKES[name]
    before = sorted(folder.rglob("*"))
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    *said, about = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert message in "\n".join(said)
    assert "Traceback" not in done.stderr
    assert json.loads(about)["loaded"] == []
    assert json.loads(about)["seconds"] < MOST
    assert sorted(folder.rglob("*")) == before


def test_every_command_has_mistakes():
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert {name.split(":")[0].split()[0] for name in MISTAKES} - {"no"} == set(commands)
