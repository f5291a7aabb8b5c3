"""Which heads look at the image: the visual attention ratio and the choice of the top R heads (section 4.2.2).

Knows ratios, not how they were captured nor what is done with the chosen heads.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from a3tune.config.ranges import check_head_count, check_heads
from a3tune.errors import ConfigError

Selection = Literal["batch", "running", "fixed"]


def visual_ratio(map_BLHN: Tensor, mass_BLH: Tensor) -> Tensor:
    """The share of a head's attention on image and prompt that falls on the image (Eq. 8).

    `map_BLHN` is the attention on each image token, `mass_BLH` that on all image and prompt tokens together. Returns
    [B, L, H]; further axes before N are kept. Where there is no mass the ratio is 0, and so is its gradient.
    """
    seen = mass_BLH > 0
    return torch.where(seen, map_BLHN.sum(-1) / torch.where(seen, mass_BLH, 1.0), 0.0)


def votes(ratio_BLH: Tensor, counted_B: Tensor) -> Tensor:
    """The ratios that rank the heads: those of the samples with an image and rows (`counted_B`), fp32 [samples, L, H].

    A ratio per group, [B, L, H, G], is averaged over the groups that hold something; the others are padding.
    """
    ratio_BLH = ratio_BLH.detach().float()
    if ratio_BLH.ndim == 4:
        real_BG = ratio_BLH.ne(0).flatten(1, 2).any(1)
        ratio_BLH = ratio_BLH.sum(-1) / real_BG.sum(-1).clamp_min(1)[:, None, None]
    return ratio_BLH[counted_B]


def head_count(heads: int | float | str, total: int) -> int:
    """R of Eq. 9 for a model of `total` = L * H heads, from 1 to `total`.

    `heads`: an int >= 1 is R itself; text such as "12.5%" (> 0%, <= 100%) or a float > 0 and < 1 is its share of all
    heads, rounded, at least one head. Raises ConfigError for anything else, and for more heads than there are.
    """
    _check(heads)
    if isinstance(heads, int):
        check_head_count("heads", heads, total)
        return heads
    share = float(heads.removesuffix("%")) / 100 if isinstance(heads, str) else heads
    return max(1, round(share * total))


def _check(heads: int | float | str) -> None:
    try:
        check_heads(heads)
    except ValueError as error:
        hint = "; for no alignment set the loss weight to 0" if heads == 0 else ""
        raise ConfigError(f"heads: {error}{hint}") from None


class HeadSelector:
    """Chooses the R heads with the highest visual attention ratio (the indicator of Eq. 9).

    `heads`: R, or its share of all L * H heads (`head_count`). `mode`: `batch` ranks by the mean over the batch's
    samples (the paper), `running` by an exponential average over batches, `fixed` by what `calibrate` or `fix` was
    given. `momentum` in [0, 1) is the weight of the past in `running`. `total` sums a tensor over all processes, so
    that their batches vote as one. Raises ConfigError for values out of range.
    """

    def __init__(
        self,
        heads: int | float | str,
        mode: Selection = "batch",
        *,
        momentum: float = 0.9,
        total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        _check(heads)
        if mode not in get_args(Selection):
            raise ConfigError(f"head_selection: expected one of {', '.join(get_args(Selection))}, got {mode!r}")
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.heads = heads
        self.mode = mode
        self.momentum = momentum
        self.total = total
        self._score_LH: Tensor | None = None

    @torch.no_grad()
    def select(self, ratio_BLH: Tensor, counted_B: Tensor) -> Tensor:
        """The heads to align in this batch, bool [L, H].

        Takes what `votes` takes. A batch without any vote chooses no head in mode `batch`, and does not move the
        running average. Raises ConfigError if there are fewer than R heads, or if mode `fixed` was given nothing.
        """
        layers, heads = ratio_BLH.shape[1:3]
        if self.mode == "fixed":
            if self._score_LH is None:
                raise ConfigError(
                    "head_selection: fixed: no heads were given; call calibrate() or fix() before training"
                )
            score_LH = self._score_LH
        elif self.mode == "running":
            score_LH = self._score_LH = self._average(self.mean_vote(votes(ratio_BLH, counted_B)))
        else:
            score_LH = self.mean_vote(votes(ratio_BLH, counted_B))
        if score_LH is None:
            return torch.zeros(layers, heads, dtype=torch.bool, device=ratio_BLH.device)
        if score_LH.shape != (layers, heads):
            raise ConfigError(
                f"head_selection: {self.mode}: scores are for {score_LH.shape[0]} layers of {score_LH.shape[1]} heads, "
                f"but the model has {layers} layers of {heads}"
            )
        return _top(score_LH.to(ratio_BLH.device), head_count(self.heads, layers * heads))

    def mean_vote(self, votes_BLH: Tensor) -> Tensor | None:
        """The mean over the votes of all processes, fp32 [L, H]; None if none of them has any. All must call this."""
        shape = votes_BLH.shape[1:]
        count = votes_BLH.new_tensor([len(votes_BLH)])
        sums, voters = self.total(torch.cat([votes_BLH.sum(0).flatten(), count])).split([shape.numel(), 1])
        return sums.view(shape) / voters if voters > 0 else None

    def calibrate(self, ratio_LH: Tensor | None) -> None:
        """Rank by this mean ratio, float [L, H], from now on (mode `fixed`), or start the running average there.

        Raises ConfigError if it is None or not finite, as the mean over no sample is.
        """
        if ratio_LH is None or not ratio_LH.isfinite().all():
            raise ConfigError(
                "head_selection: fixed: the mean ratio is not finite; calibrate on samples that have an image"
            )
        self._score_LH = ratio_LH.detach().float().clone()

    def fix(self, chosen: Sequence[tuple[int, int]], shape: tuple[int, int]) -> None:
        """Choose exactly these (layer, head) pairs, counted from 0, of a model with `shape` = (L, H) heads.

        Raises ConfigError for a pair outside the model, a pair named twice, or if their number is not R.
        """
        layers, heads = shape
        outside = [pair for pair in chosen if not (0 <= pair[0] < layers and 0 <= pair[1] < heads)]
        if outside:
            raise ConfigError(f"heads: expected (layer, head) pairs below ({layers}, {heads}), got {outside[0]}")
        count = head_count(self.heads, layers * heads)
        if len(set(chosen)) != len(chosen) or len(chosen) != count:
            raise ConfigError(f"heads: expected {count} different (layer, head) pairs, got {len(set(chosen))}")
        score_LH = torch.zeros(layers, heads)
        score_LH[tuple(torch.tensor(chosen).T)] = 1.0
        self._score_LH = score_LH

    def state_dict(self) -> dict[str, Tensor]:
        """What must be saved to go on: the ranking scores [L, H], if there are any yet."""
        return {} if self._score_LH is None else {"score_LH": self._score_LH}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` returned."""
        self._score_LH = state.get("score_LH")

    def _average(self, batch_LH: Tensor | None) -> Tensor | None:
        if batch_LH is None or self._score_LH is None:
            return self._score_LH if batch_LH is None else batch_LH
        return torch.lerp(batch_LH, self._score_LH.to(batch_LH.device), self.momentum)


def overlap(previous_LH: Tensor, current_LH: Tensor) -> float:
    """The share of the previously chosen heads that are chosen still, in [0, 1]; 0 if none were chosen."""
    return int((previous_LH & current_LH).sum()) / max(1, int(previous_LH.sum()))


def _top(score_LH: Tensor, count: int) -> Tensor:
    # A stable order, so that ties are broken alike on every device and after resuming.
    order = score_LH.flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(score_LH.numel(), dtype=torch.bool, device=score_LH.device)
    chosen[order[:count]] = True
    return chosen.view_as(score_LH)
