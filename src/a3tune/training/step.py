"""The losses of one batch: forward pass -> heads -> alignment -> both losses (Eq. 8-12).

Knows tensors, an adapted model and the settings of the alignment; no Trainer. How many passes and processes make up an
optimiser step comes in as numbers, and what is worth logging goes out as values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from a3tune.adapters import balance_loss
from a3tune.attention.align import alignment_loss, averaged_map, inside_share, labelled
from a3tune.attention.capture import CaptureRequest, capture_request, check_captured, stack
from a3tune.attention.heads import HeadSelector, overlap
from a3tune.config import AlignmentConfig
from a3tune.training.collate import learning, split_batch
from a3tune.vlm.look import look


@dataclass(frozen=True, eq=False)
class StepLosses:
    """Both losses of one batch, each its share of the mean over the optimiser step."""

    total: Tensor
    """Eq. 12, and the load-balance term where it has a weight; the only one to take gradients of."""
    llm: Tensor
    align: Tensor | None
    """Without its weight; None without alignment."""
    statistics: "AlignmentStatistics | None"
    outputs: Any
    """Of the model."""


def step_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    alignment: "Alignment | None",
    *,
    tokens: Tensor | int,
    samples: int,
    processes: int = 1,
    routed: bool = True,
    load_balance: float = 0.0,
) -> StepLosses:
    """L_LLM + weight * L_align (Eq. 12) of one batch of `collate.Collator`.

    Args:
        alignment: None: the language-modelling loss alone, and no attention is captured.
        tokens: to learn in the whole optimiser step, over its passes and all processes; L_LLM is their mean.
        samples: that learn, counted alike; L_align is their mean.
        processes: that average their gradients with each other.
        routed: whether the adapter has experts.
        load_balance: weight of the routers' load-balance term.
    """
    inputs, masks = split_batch(batch)
    learning_B = learning(batch)
    share = processes / samples

    request = alignment.request(masks) if alignment else None
    outputs = look(model, inputs, masks, request, routed=routed, num_items_in_batch=tokens)
    total = llm = outputs.loss * processes  # Eq. 11: the model has divided by `tokens`
    align = statistics = None
    if alignment and request:
        align, statistics = alignment.loss(outputs.attentions, request, batch["segments"], learning_B, share=share)
        total = llm + alignment.weight * align  # Eq. 12
    if load_balance:
        total = total + load_balance * balance_loss(model) * learning_B.sum() * share
    return StepLosses(total, llm.detach(), None if align is None else align.detach(), statistics, outputs)


@dataclass(frozen=True, eq=False)
class AlignmentStatistics:
    """What one batch says of the alignment, without gradients. Sums, so that those of several batches add up."""

    samples: Tensor
    """How many samples learn."""
    labelled: Tensor
    """How many of them have a segment, an image and rows."""
    inside: Tensor
    """Summed over these: the share of the selected heads' attention on the image that falls into the segments."""
    kept: float | None
    """Share of the heads of the batch before that are selected again; None for the first batch."""


class Alignment:
    """The alignment loss, one batch after the other: which attention to capture, which heads, how far it misses.

    For any training loop over a model whose attention can be captured (`attention.capture.use_capture`):

        request = alignment.request(masks)
        outputs = model(**inputs, use_cache=False, capture=request, output_attentions=True)
        align, statistics = alignment.loss(outputs.attentions, request, segments)
        loss = outputs.loss + alignment.weight * align

    Args:
        config: weight, heads, rows and variant.
        model: whose attention it is; the first loss makes sure that its gradient reaches what is trained.
        total: sums a tensor over all processes, so that their batches choose the heads as one.
    """

    def __init__(
        self, config: AlignmentConfig, model: nn.Module, *, total: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> None:
        self.config = config
        self.weight = config.weight
        """Lambda of Eq. 12."""
        self.selector = HeadSelector(config.heads, config.head_selection, total=total)
        self.heads_LH: Tensor | None = None
        """bool: the heads of the last batch."""
        self._model = model
        self._checked = False

    def request(self, masks: Mapping[str, Tensor]) -> CaptureRequest:
        """Which attention the forward pass must bring out, by the batch's token masks (`vlm.encode.TOKEN_MASKS`)."""
        return capture_request(self.config.rows, **masks, each_row=self.config.variant == "code")

    def loss(
        self,
        attentions: Sequence[Tensor] | None,
        request: CaptureRequest,
        segments_BKN: Tensor,
        learning_B: Tensor | None = None,
        *,
        share: float | None = None,
    ) -> tuple[Tensor, AlignmentStatistics]:
        """L_align of a batch (Eq. 8-10), without its weight, and what to log.

        A sample without a segment counts, with loss 0. Heads are chosen anew for each batch, unless they are fixed.

        Args:
            attentions: `outputs.attentions` of the pass that was given `request`.
            segments_BKN: float, how far each image token lies in each segment; all-zero segments are padding.
            learning_B: bool, the samples that learn; the others neither vote for heads nor count. None: all.
            share: of one sample in the mean: 1 / samples of the optimiser step, however many batches it has; where
                processes average their gradients, their number / samples over all of them. None: the batch's mean.

        Raises ModelError if `attentions` are not ours or, at the first batch, if gradients do not reach all maps.
        """
        if not self._checked and torch.is_grad_enabled():
            check_captured(attentions, self._model)
            self._checked = True
        captured = stack(attentions, request)
        if learning_B is None:
            learning_B = torch.ones_like(captured.counted_B)
        segments_BKN = segments_BKN * learning_B[:, None, None]

        heads_LH = self.selector.select(captured.ratio_BLH.detach(), captured.counted_B & learning_B)  # Eq. 8-9
        map_BN = averaged_map(captured.map_BLHN, heads_LH)  # Eq. 9
        loss_B = alignment_loss(map_BN, segments_BKN, self.config.variant)  # Eq. 10

        labelled_B = labelled(segments_BKN) & captured.counted_B
        statistics = AlignmentStatistics(
            samples=learning_B.sum(),
            labelled=labelled_B.sum(),
            inside=inside_share(map_BN.detach(), segments_BKN)[labelled_B].sum(),
            kept=None if self.heads_LH is None else overlap(self.heads_LH, heads_LH),
        )
        self.heads_LH = heads_LH
        return loss_B.sum() * (1 / learning_B.sum().clamp_min(1) if share is None else share), statistics

    def state_dict(self) -> dict[str, Tensor]:
        """What it keeps from batch to batch: the selector's scores and the last heads, as far as there are any."""
        return self.selector.state_dict() | ({} if self.heads_LH is None else {"heads_LH": self.heads_LH})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state_dict` returned."""
        self.selector.load_state_dict(state)
        self.heads_LH = state.get("heads_LH")
