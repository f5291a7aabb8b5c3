"""The first step of `a3tune train`, which trainers of others are compared with."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.data.phantom import write_phantom


def first_step_of_command(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Rows that `a3tune train` took as one batch, and the line that it logged of them."""
    data = write_phantom(folder / "scans", {"train": 1})["train"]
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:8]))
    settings = ["labels.source=truth", "adapter.rank=8", "model.device=cpu", "training.bf16=false"]
    settings += ["alignment.weight=0.3", "alignment.heads=0.125", "training.max_steps=1", "training.log_steps=1"]
    run = CliRunner().invoke(app, ["train", f"data.train={data}", f"output={folder / 'run'}", *settings])
    assert run.exit_code == 0, run.output
    return data, json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])
