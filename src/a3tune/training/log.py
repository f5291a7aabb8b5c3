"""What a training logs: averages since the last line, over all processes; a file and a progress bar that show them.

Knows the names of what is logged and the records that it comes from; not how a loss is made.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback

from a3tune.adapters import gate_loads
from a3tune.machine.files import append, write_atomic
from a3tune.training.counting import CountingTrainer
from a3tune.training.score import VALIDATION
from a3tune.training.step import Alignment, StepLosses

_AVERAGES = {
    "loss_llm": ("loss_llm", "steps"),
    "loss_align": ("loss_align", "steps"),
    "labelled": ("labelled", "samples"),
    "attention_inside": ("inside", "labelled"),
    "heads_overlap": ("kept", "pairs"),
}
"""What is logged, as one sum over another."""
_SUMS = sorted({name for pair in _AVERAGES.values() for name in pair})


class LogSums:
    """Sums of what happened since the last log line, kept on the device so that adding does not wait for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = dict.fromkeys(_SUMS, 0.0)

    def add_step(self) -> None:
        """An optimiser step begins."""
        self._add(steps=1)

    def add_losses(self, losses: StepLosses) -> None:
        """What one pass brought."""
        self._add(loss_llm=losses.llm)
        if losses.align is not None:
            self._add(loss_align=losses.align)
        if (seen := losses.statistics) is not None:
            self._add(samples=seen.samples, labelled=seen.labelled, inside=seen.inside)
            if seen.kept is not None:
                self._add(kept=seen.kept, pairs=1)

    def copy(self) -> "LogSums":
        other = LogSums()
        other._sums = dict(self._sums)
        return other

    def take(self, accelerator: Any) -> dict[str, float]:
        """The averages over all processes, without those that nothing was counted for; starts anew."""
        sums = torch.stack(
            [torch.as_tensor(self._sums[name], dtype=torch.float32).to(accelerator.device) for name in _SUMS]
        )
        total = dict(zip(_SUMS, accelerator.reduce(sums, reduction="mean").tolist(), strict=True))
        aligned = total["samples"] > 0
        self._sums = dict.fromkeys(_SUMS, 0.0)
        return {
            name: total[above] / total[below]
            for name, (above, below) in _AVERAGES.items()
            if total[below] > 0 and (aligned or name == "loss_llm")
        }

    def _add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value


class LoggingTrainer(CountingTrainer):
    """A Trainer whose log lines tell both losses, what the heads look at and how the experts are used."""

    alignment: Alignment

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sums = LogSums()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        self.sums.add_step()
        return super().get_batch_samples(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            line: dict[str, Any] = {**logs, **self.sums.take(self.accelerator)}
            model: Any = self.model
            for kind, load in gate_loads(model).items():
                use, entropy = (self.accelerator.reduce(x.mean(0), "mean") for x in (load.use, load.entropy))
                line |= {f"{kind}_use": use.tolist(), f"{kind}_entropy": entropy.item()}  # pyright: ignore
            if self.alignment.heads_LH is not None:
                line["heads_selected"] = ["".join(map(str, row)) for row in self.alignment.heads_LH.int().tolist()]
            logs = line
        super().log(logs, start_time)


def of_a_step(logs: Mapping[str, Any]) -> bool:
    """Whether a line says something of a step or of the validation, not of the training as a whole."""
    return any(name == "loss" or name.startswith(VALIDATION) for name in logs)


class MetricsFile(TrainerCallback):
    """Appends every log line to `metrics.jsonl`: one JSON object with `step`, `epoch` and what `A3Trainer` logs.

    What the validation measured is a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():
            # What was logged after the checkpoint comes again.
            kept = [
                line for line in self.path.read_text().splitlines(keepends=True) if _step(line) <= state.global_step
            ]
            write_atomic(self.path, "".join(kept).encode())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or not of_a_step(logs):
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in logs.items()
        }
        append(self.path, (json.dumps({"step": state.global_step, **finite}) + "\n").encode())


def in_brief(logs: Mapping[str, Any]) -> dict[str, str]:
    """What a line on the screen has room for."""
    measured = (VALIDATION + name for name in ("loss_llm", "open_recall", "closed_accuracy"))
    names = ("loss_llm", "loss_align", "attention_inside", *measured)
    return {name: f"{logs[name]:.3g}" for name in names if isinstance(logs.get(name), int | float)}


class ProgressBar(ProgressCallback):
    """One line on the terminal, with the last losses at its end."""

    def __init__(self) -> None:
        super().__init__()
        self._brief: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self._brief |= in_brief(logs or {})
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._brief)


def _step(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):  # cut short when the run was killed
        return math.inf
    return step if isinstance(step, int | float) else math.inf
