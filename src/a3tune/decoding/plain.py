"""Greedy decoding, beams, nucleus and sampling: the model's own scores, through transformers' `generate`."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.decoding.base import Inputs
from a3tune.decoding.loop import run
from a3tune.vlm.load import Vlm


class Plain:
    """What the four have in common: everything but their strategy."""

    name: ClassVar[str]
    strategy: ClassVar[str]

    def check(self, vlm: Vlm) -> None:
        """Nothing to check: any model can do it."""

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return run(vlm, inputs, config, generator)


@dataclass(frozen=True)
class Greedy(Plain):
    """The most likely token at each step."""

    name: ClassVar[str] = "greedy"
    strategy: ClassVar[str] = "greedy"


@dataclass(frozen=True)
class Beam(Plain):
    """The most likely of five answers that grow side by side (Sutskever et al. 2014)."""

    name: ClassVar[str] = "beam"
    strategy: ClassVar[str] = "beam"


@dataclass(frozen=True)
class Nucleus(Plain):
    """Sampling from the most likely tokens that have 90 % of the probability (Holtzman et al. 2020)."""

    name: ClassVar[str] = "nucleus"
    strategy: ClassVar[str] = "nucleus"


@dataclass(frozen=True)
class Sampling(Plain):
    """Sampling from the 50 most likely tokens at temperature 0.7: the paper's row without a method's name."""

    name: ClassVar[str] = "sampling"
    strategy: ClassVar[str] = "sampling"
