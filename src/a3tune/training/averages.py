"""What the trainer logs: averages since the last line, over all processes. Knows names and sums, no model."""

from typing import Any

import torch
from torch import Tensor

_AVERAGES = {
    "loss_llm": ("loss_llm", "steps"),
    "loss_align": ("loss_align", "steps"),
    "labelled": ("labelled", "samples"),
    "attention_inside": ("inside", "labelled"),
    "heads_overlap": ("overlap", "overlaps"),
}
"""What is logged, as one sum over another."""
_SUMS = sorted({name for pair in _AVERAGES.values() for name in pair})


class Averages:
    """Sums of what happened since the last log line, kept on the device so that adding does not wait for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = dict.fromkeys(_SUMS, 0.0)

    def add(self, name: str, value: Tensor | float) -> None:
        self._sums[name] = self._sums[name] + (value.detach() if isinstance(value, Tensor) else value)

    def copy(self) -> "Averages":
        other = Averages()
        other._sums = dict(self._sums)
        return other

    def take(self, accelerator: Any) -> dict[str, float]:
        """The averages over all processes, without those that nothing was counted for; starts anew."""
        sums = torch.stack(
            [torch.as_tensor(self._sums[name], dtype=torch.float32).to(accelerator.device) for name in _SUMS]
        )
        total = dict(zip(_SUMS, accelerator.reduce(sums, reduction="mean").tolist(), strict=True))
        captured = total["samples"] > 0
        self._sums = dict.fromkeys(_SUMS, 0.0)
        return {
            name: total[above] / total[below]
            for name, (above, below) in _AVERAGES.items()
            if total[below] > 0 and (captured or name == "loss_llm")
        }
