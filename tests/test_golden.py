"""The first 20 losses of three small trainings, against the recorded ones: a change that means to leave training as it
is shows here that it does.

On the machine that recorded them (torch and processor of `golden/losses.json`) they are equal to the last digit, on
others nearly. Where a change explains other losses, record them anew, and say why in the commit:

    python tests/test_golden.py
"""

import json
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from a3tune.cli import app
from a3tune.data.phantom import write_phantom

RECORD = Path(__file__).parent / "golden" / "losses.json"
LOSSES = ("loss_llm", "loss_align")
STEPS = 20
SHARED = [
    f"training.max_steps={STEPS}",
    "training.log_steps=1",
    "training.batch_size=4",
    "training.learning_rate=1e-3",
    "training.bf16=false",
    "model.device=cpu",
    "adapter.rank=8",
    "adapter.expert_rank=4",
    "adapter.dropout=0.1",
    "alignment.until=null",
]
RUNS = {
    "lora": ["adapter.kind=lora", "labels.source=none"],
    "a3tune": ["alignment.weight=0.3", "alignment.heads=0.125", "training.load_balance=0.01"],
    "qlora": ["model.quantization=4bit", "alignment.weight=0.3", "alignment.heads=0.25", "alignment.rows=answer"],
}


def machine() -> dict[str, str]:
    """What the last digits depend on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else platform.processor()
    found = re.search(r"model name\s*: (.*)", text)
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": found[1] if found else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def losses(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Run -> loss -> its value at each step, by the commands that a user types."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = write_phantom(folder / "data", {"train": 5}, seed=7)["train"]
        _run("label", data, "--out", folder / "labels")
        for name, own in RUNS.items():
            output = [f"data.train={data}", f"labels.store={folder / 'labels'}", f"output={folder / name}"]
            _run("train", *SHARED, *own, *output)
        return {name: _logged(folder / name / "metrics.jsonl") for name in RUNS}
    finally:
        torch.set_num_threads(threads)


def _run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def _logged(path: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {name: [line[name] for line in lines] for name in LOSSES if name in lines[0]}


def test_losses_are_the_recorded_ones(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    record = json.loads(RECORD.read_text())
    found = losses(tmp_path)
    if machine() == record["machine"]:
        assert found == record["losses"]
    for name, recorded in record["losses"].items():
        for loss, values in recorded.items():
            assert found[name][loss] == pytest.approx(values, rel=2e-3), f"{name}: {loss}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        content = {"machine": machine(), "losses": losses(Path(folder))}
    if RECORD.is_file() and "--check" in sys.argv:
        sys.exit(json.loads(RECORD.read_text())["losses"] != content["losses"])
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(content, indent=1) + "\n")
