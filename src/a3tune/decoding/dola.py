"""DoLa (Chuang et al. 2023): against what an early layer of the same model would say."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from a3tune.config.ranges import Share
from a3tune.decoding.base import Inputs
from a3tune.decoding.contrast import cutoff
from a3tune.decoding.loop import NEVER, run
from a3tune.errors import ModelError
from a3tune.vlm.load import Vlm


@dataclass(frozen=True)
class Dola:
    """Settings of the paper's Appendix B; the mature layer is the last one of any model.

    Every sequence chooses its own early layer at each step. The published code lets a whole batch share one, so that
    its answers depend on the batch; they are the same for a batch of one. It has no beams: here a beam is a sequence,
    and its scores are made probabilities again before beams add them up.
    """

    name: ClassVar[str] = "dola"
    strategy: ClassVar[str] = "greedy"
    layers: tuple[int, ...] = tuple(range(0, 16, 2))
    """Candidates for the early layer, counted as `hidden_states` are: 0 is the embeddings. Those that the model does
    not have below its last layer are left out, and so is 0 where the head is the embeddings: it repeats its input."""
    beta: Share = 0.1
    """Cutoff; see `contrast.cutoff`."""
    variant: Literal["code", "paper"] = "code"
    """How far two layers are from each other. paper: Jensen-Shannon divergence. code: what was published, with the
    arguments of KL exchanged."""

    def check(self, vlm: Vlm) -> None:
        """Raises ModelError when no candidate is left."""
        self.candidates(vlm)

    def candidates(self, vlm: Vlm) -> tuple[int, ...]:
        """The early layers that this model can choose from. Raises ModelError when there are none."""
        model: Any = vlm.model
        depth = len(model.get_decoder().layers)
        first = 1 if model.get_output_embeddings().weight is model.get_input_embeddings().weight else 0
        layers = tuple(layer for layer in self.layers if first <= layer < depth)
        if not layers:
            raise ModelError(
                f"{self.name}: needs an early layer from {first} to {depth - 1} in {vlm.name}, got "
                f"{', '.join(map(str, self.layers)) or 'none'}; name some in `layers`"
            )
        return layers

    def __call__(
        self,
        vlm: Vlm,
        inputs: Inputs,
        config: GenerationConfig,
        *,
        regions_BN: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        with _last_states(vlm, self.candidates(vlm)) as states:
            return run(vlm, inputs, config, generator, scorer=_Layers(self, vlm.model.get_output_embeddings(), states))

    def combine(self, mature_BV: Tensor, early_BCV: Tensor) -> Tensor:
        """Log-probabilities of the next token, `[B, V]`, from the logits of the last layer and of the candidates."""
        mature_BV, early_BCV = mature_BV.log_softmax(-1), early_BCV.log_softmax(-1)
        chosen_B = self.divergence(mature_BV[:, None], early_BCV).argmax(1)
        early_BV = early_BCV[torch.arange(len(chosen_B), device=chosen_B.device), chosen_B]
        return cutoff(mature_BV - early_BV, mature_BV, self.beta).log_softmax(-1)

    def divergence(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """How far two distributions `[..., V]` (log-probabilities) are from each other, `[...]`."""
        log_m = torch.logaddexp(log_p, log_q) - log(2)
        if self.variant == "paper":
            return (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).mean(-1) / 2
        return (log_m.exp() * (2 * log_m - log_p - log_q)).mean(-1) / 2


class _Layers:
    """A `loop.Scorer`: the last layer's scores against those of the layers whose states stand in `states`."""

    def __init__(self, dola: Dola, head: Any, states: Sequence[Tensor]) -> None:
        self.dola, self.head, self.states = dola, head, states

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The head reads them without the final norm, as published.
        states_BCD = torch.stack([state.to(self.head.weight.device) for state in self.states], dim=1)
        early_BCV = self.head(states_BCD).to(scores)
        # The prompt has one row per sample, its scores one per beam.
        early_BCV = early_BCV.repeat_interleave(len(scores) // len(early_BCV), dim=0)
        # A token that no answer may hold tells nothing of how far layers are from each other.
        return self.dola.combine(scores, early_BCV.masked_fill((scores <= NEVER)[:, None], NEVER))

    def reorder(self, beam_B: Tensor) -> None:
        """Nothing is kept from one step to the next."""


@contextmanager
def _last_states(vlm: Vlm, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """`hidden_states[j][:, -1]` of the latest pass for every j of `layers`.

    `output_hidden_states` would bring the same at the price of the whole prompt's states at each of them.
    """
    decoder: Any = vlm.model.get_decoder()
    states = [torch.empty(0)] * len(layers)

    def keep(place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            states[place] = args[0][:, -1]

        return hook

    hooks = [decoder.layers[layer].register_forward_pre_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
