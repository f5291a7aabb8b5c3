"""The frozen tower's answer to an image, kept for the next epoch, run and test: trainings here leave the tower alone.

Knows the tiny LLaVA only. What is kept is what the tower gave, to the last digit for the same batch size or not: rows
of a batch do not know each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from a3tune.commands import subject
from a3tune.training import train
from a3tune.vlm.load import Vlm, load_vlm

_kept: dict[tuple[str, bytes], Tensor] = {}
"""(model, pixels) -> the tower's last hidden state, [tokens, width]."""


class KeepingTower(nn.Module):
    """A vision tower that looks at an image once."""

    def __init__(self, tower: nn.Module, name: str) -> None:
        super().__init__()
        self.tower, self.name = tower, name

    def forward(self, pixel_values: Tensor, **keywords: Any) -> BaseModelOutputWithPooling:
        keys = [(self.name, sha1(image.numpy().tobytes()).digest()) for image in pixel_values]
        new = {key: row for row, key in enumerate(keys) if key not in _kept}
        if new:
            with torch.no_grad():
                states = self.tower(pixel_values[list(new.values())], **keywords).hidden_states[-1]
            _kept.update(zip(new, states, strict=True))
        last = torch.stack([_kept[key] for key in keys])
        return BaseModelOutputWithPooling(hidden_states=(last,))


@contextmanager
def kept() -> Iterator[None]:
    """While this is open, models are loaded with a tower that keeps what it saw, as long as the process lives."""

    def load(path: str, **settings: Any) -> Vlm:
        vlm = load_vlm(path, **settings)
        vlm.model.model.vision_tower = KeepingTower(vlm.model.model.vision_tower, path)
        return vlm

    with patch.object(train, "load_vlm", load), patch.object(subject, "load_vlm", load):
        yield
