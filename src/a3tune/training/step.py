"""The losses of one batch: forward pass -> heads -> alignment -> both losses (Eq. 8-12).

Knows tensors, a model and the settings of the alignment; no Trainer. How many passes and processes make up an optimiser
step comes in as `Counts`, and what is worth logging goes out as values.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from a3tune.adapters import balance_loss
from a3tune.adapters.layer import RoutedLinear
from a3tune.adapters.model import name_markup
from a3tune.attention.align import alignment_loss, averaged_map, inside_share, labelled
from a3tune.attention.capture import CaptureRequest, capture_request, check_captured, stack
from a3tune.attention.heads import HeadSelector, overlap
from a3tune.config import AlignmentConfig, load_config
from a3tune.config.ranges import check_head_count
from a3tune.data.memory import ImageLike
from a3tune.errors import ConfigError
from a3tune.labels.truth import truth_labels
from a3tune.machine import processes
from a3tune.training.collate import IGNORED, Collator, check_batch, learning, split_batch
from a3tune.training.foreign import RegionsLike, Rows, adopt, samples_of
from a3tune.vlm.load import wrap_vlm
from a3tune.vlm.look import look

DEFAULTS = AlignmentConfig()


@dataclass(frozen=True, slots=True)
class Counts:
    """What an optimiser step learns from, over its passes and all processes."""

    tokens: Tensor | int
    """To learn; L_LLM is their mean."""
    samples: int
    """With a token to learn; L_align is their mean."""
    processes: int = 1
    """That average their gradients with each other."""


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
    """Attention alignment for any training loop: its batches, which attention to capture, which heads, both losses.

        align = Alignment(model, processor, weight=0.1)
        batch = align.collate(rows)
        loss, outputs = align.loss(model, batch)

    Args:
        model: of transformers, of a family that a3tune supports, with an adapter or before it gets one. Its language
            model takes our attention function.
        processor: of the model.
        weight: lambda of Eq. 12, >= 0; with 0 no attention is captured.
        until: share of the training in which the weight falls to 0, > 0 and <= 1, as `a3tune train` has it: then a loop
            of your own sets `progress` before each step, and a Trainer does. None: it stays as it is (the paper's).
        heads: R of Eq. 9, a count >= 1 or a share of all heads, as "12.5%" or as a number > 0 and < 1.
        rows: text rows whose attention is averaged.
        head_selection: by the ratios of this batch (the paper's), their running average, or what `calibrate` found.
            Where there are several processes their batches choose as one.
        variant: Eq. 10 as printed, or as in the published code.
        membership: share of an image token's box that a region must cover to hold the token, > 0 and <= 1.
        load_balance: weight of the routers' load-balance term; the adapter is then made with `balance=True`.

    Raises ConfigError for a setting out of range, ModelError for a model whose attention cannot be captured.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        weight: float = DEFAULTS.weight,
        until: float | None = None,
        heads: int | float | str = DEFAULTS.heads,
        rows: Literal["after_image", "answer", "prompt"] = DEFAULTS.rows,
        head_selection: Literal["batch", "running", "fixed"] = DEFAULTS.head_selection,
        variant: Literal["paper", "code"] = DEFAULTS.variant,
        membership: float = DEFAULTS.membership,
        load_balance: float = 0.0,
    ) -> None:
        given = AlignmentConfig(weight, until, heads, head_selection, rows, variant, membership)
        pairs = [(f"alignment.{name}", value) for name, value in asdict(given).items()]
        config = load_config(None, [*pairs, ("training.load_balance", load_balance)])
        self.vlm = wrap_vlm(model, processor)
        self._name_markup(model)
        text = model.config.get_text_config()
        check_head_count("heads", config.alignment.heads, text.num_hidden_layers * text.num_attention_heads)
        self.config = config.alignment
        self.load_balance = config.training.load_balance
        self.selector = HeadSelector(self.config.heads, self.config.head_selection, total=processes.total)
        self.heads_LH: Tensor | None = None
        """bool: the heads of the last batch."""
        self.progress: float | None = None
        """Share of the training that is done, 0 to 1: what a weight that falls goes by."""
        self._collator = Collator(self.vlm, truth_labels, membership=self.config.membership, cache_bytes=0)
        self._checked = False

    @property
    def weight(self) -> float:
        """Lambda at this point of the training. Raises ConfigError where it falls and is not told which point it is."""
        if self.config.until is None:
            return self.config.weight
        if self.progress is None or not 0 <= self.progress <= 1:
            raise ConfigError(
                f"alignment.until: the weight falls by the share of the training that is done, 0 to 1, got "
                f"{self.progress}: set align.progress = step / steps before each step, or until=None"
            )
        return self.config.weight * (1 + math.cos(math.pi * min(1.0, self.progress / self.config.until))) / 2

    def collate(self, rows: Rows, regions: Sequence[RegionsLike] | None = None) -> dict[str, Any]:
        """Rows -> a batch with all that the losses need, on the CPU; a `data_collator`.

        Args:
            rows: mappings with the fields of a row (image, prompt, answer, ...), or samples.
            regions: for each row a list of boxes (x0, y0, x1, y1) in pixels of its image, masks `[H, W]` or regions; or
                labels; or None where nobody said. In place of the `regions` of the rows, which may be the same.

        Returns what `Collator` returns. Raises DataError and LabelError, which name row and field.
        """
        return self._collator(samples_of(rows, regions))

    def adopt(
        self, batch: Mapping[str, Any], images: Sequence[ImageLike], regions: Sequence[RegionsLike]
    ) -> dict[str, Any]:
        """A batch that a collator of your own made -> the same batch with all that the losses need.

        Args:
            batch: `input_ids`, `labels` and `attention_mask`, int64 `[B, S]`, and whatever else the model takes.
                `labels` are -100 but on the answer, one behind the image.
            images: one per sample, as the processor was given it.
            regions: as of `collate`.

        Raises DataError and LabelError, which name the sample.
        """
        return adopt(self.vlm, batch, images, regions, self.config.membership)

    def count(self, batches: Iterable[Mapping[str, Any]]) -> Counts:
        """Of an optimiser step with these batches of this process, over all processes, all of which must call this.

        Raises DataError for other batches than `loss` takes.
        """
        device, listed = self.vlm.device, list(batches)
        for batch in listed:
            check_batch(batch)
        tokens = sum(int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in listed)
        samples = sum(int(learning(batch).sum()) for batch in listed)
        summed = processes.total(torch.tensor([tokens, samples, 1], device=device)).tolist()
        return Counts(*summed)

    def loss(self, model: Any, batch: Mapping[str, Any], counts: Counts | None = None) -> tuple[Tensor, Any]:
        """L_LLM + weight * L_align (Eq. 12) of one batch, to take gradients of, and the outputs of the model.

        Args:
            model: with its adapter, wrapped for several devices or not.
            batch: of `collate` or `adopt`, on any device.
            counts: of the optimiser step that the batch is a part of (`count`): the losses of its batches then add up
                to the mean over the step. Divide them by nothing, and step after the last. None: the batch alone.

        Raises DataError for another batch, ModelError where no gradient reaches the attention, AdapterError for a
        load-balance term that the adapter does not keep.
        """
        losses = self.losses(model, batch, counts)
        return losses.total, losses.outputs

    def losses(self, model: Any, batch: Mapping[str, Any], counts: Counts | None = None) -> StepLosses:
        """As `loss`, with each loss and what is worth logging."""
        check_batch(batch)
        if not self._checked:
            self._name_markup(model)  # of an adapter that was added since
        device = next(model.parameters()).device
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        inputs, masks = split_batch(batch)
        learning_B = learning(batch)
        if counts is None:
            counts = Counts(batch["labels"][:, 1:].ne(IGNORED).sum().clamp_min(1), max(1, int(learning_B.sum())))
        share = counts.processes / counts.samples

        request = self.request(masks) if self.config.weight else None
        outputs = look(model, inputs, masks, request, routed=is_routed(model), num_items_in_batch=counts.tokens)
        total = llm = outputs.loss * counts.processes  # Eq. 11: the model has divided by `tokens`
        align = statistics = None
        if request:
            align, statistics = self.measure(outputs.attentions, request, batch["segments"], learning_B, share=share)
            if weight := self.weight:  # at 0 no gradient goes through the captured attention
                total = llm + weight * align  # Eq. 12
        if self.load_balance:
            total = total + self.load_balance * balance_loss(model) * learning_B.sum() * share
        return StepLosses(total, llm.detach(), None if align is None else align.detach(), statistics, outputs)

    def request(self, masks: Mapping[str, Tensor]) -> CaptureRequest:
        """Which attention the forward pass must bring out, by the batch's token masks (`vlm.encode.TOKEN_MASKS`)."""
        return capture_request(self.config.rows, **masks, each_row=self.config.variant == "code")

    def measure(
        self,
        attentions: Sequence[Tensor] | None,
        request: CaptureRequest,
        segments_BKN: Tensor,
        learning_B: Tensor | None = None,
        *,
        share: float | None = None,
    ) -> tuple[Tensor, AlignmentStatistics]:
        """L_align of a pass of your own (Eq. 8-10), without its weight, and what to log.

        A sample without a segment counts, with loss 0. Heads are chosen anew for each batch, unless they are fixed.

        Args:
            attentions: `outputs.attentions` of the pass, `model(..., capture=request, output_attentions=True)`.
            segments_BKN: float, how far each image token lies in each segment; all-zero segments are padding.
            learning_B: bool, the samples that learn; the others neither vote for heads nor count. None: all.
            share: of one sample in the mean: 1 / samples of the optimiser step, however many batches it has; where
                processes average their gradients, their number / samples over all of them. None: the batch's mean.

        Raises ModelError if `attentions` are not ours or, at the first batch, if gradients do not reach all maps.
        """
        if not self._checked and torch.is_grad_enabled():
            check_captured(attentions, self.vlm.model)
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

    def apart(self) -> "Alignment":
        """The same losses for an evaluation amid the training, which leaves no trace in it: on this process alone, by
        heads that are ranked as in the training, or by the samples of a pass, with the weight of the first step."""
        ranked = self.selector.state_dict()
        other = copy(self)
        other.selector = HeadSelector(self.config.heads, "fixed" if ranked else self.config.head_selection)
        other.selector.load_state_dict(ranked)
        other.heads_LH, other.load_balance, other.progress = None, 0.0, 0.0
        return other

    def _name_markup(self, model: nn.Module) -> None:
        base = self.vlm.model.get_base_model() if isinstance(self.vlm.model, PeftModel) else self.vlm.model
        name_markup(model, self.vlm.control_ids, replace(self.vlm, model=base).layout_ids)

    def state_dict(self) -> dict[str, Tensor]:
        """What it keeps from batch to batch: the selector's scores and the last heads, as far as there are any."""
        return self.selector.state_dict() | ({} if self.heads_LH is None else {"heads_LH": self.heads_LH})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state_dict` returned. Raises ConfigError for something else."""
        if other := sorted(state.keys() - {"score_LH", "heads_LH"}):
            raise ConfigError(f"state: expected what Alignment.state_dict returned, got {', '.join(other)}")
        self.selector.load_state_dict(state)
        self.heads_LH = state.get("heads_LH")


def is_routed(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, has an adapter with experts, which is told what each token is."""
    return any(isinstance(module, RoutedLinear) for module in model.modules())
