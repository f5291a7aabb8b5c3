"""The installed package as users have it: the demo in an empty folder, then a training that is killed and goes on.

`python -I tests/installed.py` with the Python of an environment that holds the wheel (`make test-versions`). Ends with
the versions that it ran on.
"""

import json
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import requires, version
from pathlib import Path

import a3tune

COMMAND = str(Path(sys.executable).with_name("a3tune"))
SMALL = ["training.max_steps=6", "training.batch_size=4", "training.save_steps=1", "evaluation.max_new_tokens=3"]
DEMO = ["demo", "patients.train=2", "patients.validation=1", "patients.test=2", *SMALL]
TRAIN = ["train", "data.train=runs/demo/data/train.jsonl", "labels.source=truth", *SMALL]
PATIENCE = 120
"""Seconds until a training must have saved its second checkpoint."""


def main() -> None:
    inside = sysconfig.get_path("purelib")
    if not Path(str(a3tune.__file__)).is_relative_to(inside):
        raise SystemExit(f"a3tune is at {a3tune.__file__}: expected the wheel, in {inside}")
    with tempfile.TemporaryDirectory() as folder:
        demo(Path(folder))
        killed_and_resumed(Path(folder))
    print("Python", platform.python_version(), *versions())


def demo(folder: Path) -> None:
    subprocess.run([COMMAND, *DEMO], cwd=folder, check=True)
    methods = json.loads((folder / "runs" / "demo" / "summary.json").read_text())["methods"]
    assert list(methods) == ["base", "lora", "a3tune", "a3tune_truth"], methods
    assert "<html" in (folder / "runs" / "demo" / "report.html").read_text()


def killed_and_resumed(folder: Path) -> None:
    subprocess.run([COMMAND, *TRAIN, "output=whole"], cwd=folder, check=True)
    parts = [COMMAND, *TRAIN, "output=parts"]
    with subprocess.Popen(parts, cwd=folder) as training:
        until, second = time.monotonic() + PATIENCE, folder / "parts" / "checkpoints" / "checkpoint-2"
        while not second.exists() and training.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        training.kill()
    assert training.returncode < 0 and not (folder / "parts" / "adapter").exists(), "it was not killed in the middle"
    subprocess.run(parts, cwd=folder, check=True)
    one, other = (folder / run / "adapter" / "adapter_model.safetensors" for run in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes(), "a resumed training ended at another adapter"


def versions() -> list[str]:
    """Of the direct dependencies."""
    needed = [re.split(r"[^\w.-]", need)[0] for need in requires("a3tune") or [] if "extra ==" not in need]
    return [f"{name} {version(name)}" for name in ("a3tune", *needed)]


if __name__ == "__main__":
    main()
