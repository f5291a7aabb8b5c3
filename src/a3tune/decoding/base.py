"""What every decoding method is: settings with published defaults, and a call that answers a batch.

Knows no method.
"""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig

from a3tune.attention.capture import ATTENTION
from a3tune.compat.attention import attention_implementation
from a3tune.errors import ModelError
from a3tune.vlm.load import Vlm

Inputs = dict[str, Any]
"""What `vlm.encode.pad` makes of prompts, padded on the left, on the model's device, without `TOKEN_MASKS`."""


class Decoder(Protocol):
    """A decoding method: a frozen dataclass whose fields are its settings.

    One that must be told the true region of every question says so by `needs_regions: ClassVar[bool] = True`, one that
    cannot sample by `searches: ClassVar[bool] = True`.
    """

    name: ClassVar[str]
    """Its name in `DECODERS`."""
    strategy: ClassVar[str]
    """How its published form chooses the next token: a name in `strategy.STRATEGIES`."""

    def check(self, vlm: Vlm) -> None:
        """Raises ModelError when the model lacks what the method needs; the message names it."""
        ...

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Answer a batch.

        Args:
            inputs: int64 `input_ids` and `attention_mask` `[B, S]`, and what the images became.
            config: how the next token is chosen (`Strategy.config`).
            regions_BN: bool, or the covered fraction: which image tokens hold the true region, in feature order; only
                for methods that need it.
            generator: source of all random numbers, on the model's device; None takes torch's own.

        Returns the new tokens, int64 `[B, S_new]`, padded on the right.
        """
        ...


def require_capture(vlm: Vlm, name: str) -> None:
    """ModelError, which calls the method `name`, when the model does not use our attention function."""
    if attention_implementation(vlm.model) != ATTENTION:
        raise ModelError(
            f"{name}: needs the model's attention, but {vlm.name} was loaded without capture; "
            "use load_vlm(..., attention=True)"
        )
