"""Samples and their regions -> a training batch, and what is what in it.

Knows samples, regions and the model's tokens; no losses. "Labels" of a batch are transformers' name for the ids of the
tokens to learn; where to look is a batch's "segments".
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from a3tune.data.images import load_image
from a3tune.errors import DataError, LabelError
from a3tune.masks import decode_mask
from a3tune.types import Labels, Sample
from a3tune.vlm.encode import TOKEN_MASKS, Example, pad, prepare
from a3tune.vlm.load import Vlm
from a3tune.vlm.patches import members, token_weights

CACHE_BYTES = 2**30
IGNORED = -100
"""In `labels`: a token that is not learnt."""
FOR_THE_LOSSES = ("segments", "sample_ids")
"""Keys of a batch that, like `TOKEN_MASKS`, are not inputs of the model."""
RegionSource = Callable[[Sample, int, int], Labels | None]
"""(sample, image height, image width) -> where to look; None where nobody said."""


@dataclass(frozen=True)
class _Item:
    example: Example
    segments: torch.Tensor
    """float32 `[K, N]`."""

    @property
    def nbytes(self) -> int:
        example = self.example
        images, token_types = example.images.values(), example.token_types.values()
        return sum(array.nbytes for array in (example.input_ids, example.boxes, self.segments, *images, *token_types))


class Collator:
    """Makes a batch out of samples; a `data_collator` for `A3Trainer`.

    Samples are kept ready for the next epoch, in at most `cache_bytes` of memory (per data-loading process); the least
    recently used go first.

    Args:
        vlm: model and processor.
        regions_for: where to look for a sample; one without regions, or with none, is unlabelled, which is no error.
        membership: share of an image token's box that a segment must cover to hold the token (`patches.members`).
        cache_bytes: upper bound of the cache.
    """

    def __init__(
        self,
        vlm: Vlm,
        regions_for: RegionSource,
        *,
        membership: float = 0.5,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.vlm = vlm
        self.regions_for = regions_for
        self.membership = membership
        self.cache_bytes = cache_bytes
        self._items: OrderedDict[str, _Item] = OrderedDict()
        self._bytes = 0

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Right-padded batch.

        Returns what `vlm.encode.pad` returns, `segments` float32 `[B, K, N]` (1 where an image token is in a segment;
        zero-padded) and `sample_ids`, a list of B texts. `labels` are cut to the `logits_to_keep` last positions, those
        from the batch's first answer on: logits of prompts cost memory and teach nothing. Raises `DataError` or
        `LabelError` naming the sample that cannot be used.
        """
        items = [self._item(sample) for sample in samples]
        batch = dict(pad(self.vlm, [item.example for item in items], padding_side="right"))
        # The position before the first answer token predicts it.
        first = int(batch["answer_mask"].any(0).int().argmax())
        batch["logits_to_keep"] = batch["answer_mask"].shape[1] - first + 1
        batch["labels"] = batch["labels"][:, -batch["logits_to_keep"] :]
        batch["segments"] = pad_segments([item.segments for item in items])
        batch["sample_ids"] = [sample.id for sample in samples]
        return batch

    def _item(self, sample: Sample) -> _Item:
        if sample.id in self._items:
            self._items.move_to_end(sample.id)
            return self._items[sample.id]
        item = self._make(sample)
        self._items[sample.id] = item
        self._bytes += item.nbytes
        while self._bytes > self.cache_bytes:
            self._bytes -= self._items.popitem(last=False)[1].nbytes
        return item

    def _make(self, sample: Sample) -> _Item:
        try:
            image = load_image(sample.image)
            example = prepare(self.vlm, [image], sample.prompt, sample.answer)
        except DataError as error:
            raise DataError(f"sample {sample.id}: {error}") from error
        regions = self.regions_for(sample, image.height, image.width)
        return _Item(example, on_tokens(sample, regions, example.boxes, (image.height, image.width), self.membership))


def on_tokens(
    sample: Sample, regions: Labels | None, boxes: np.ndarray, size: tuple[int, int], membership: float
) -> torch.Tensor:
    """Which image tokens are in which segment, float32 `[K, N]`.

    Args:
        boxes: of the image tokens, `[N, 4]` (`grids.token_boxes`).
        size: height and width of the image.

    Raises LabelError, which names the sample, for labels of an image of another size.
    """
    weights = [np.zeros((0, len(boxes)), np.float32)]
    for segment in regions.segments if regions else ():
        if segment.mask.size != size:
            height, width = segment.mask.size
            raise LabelError(
                f"sample {sample.id}: its labels are for an image of {width} x {height} pixels, but the image has "
                f"{size[1]} x {size[0]}. Label the data again."
            )
        weights.append(token_weights(decode_mask(segment.mask)[None], boxes))
    return torch.from_numpy(members(np.concatenate(weights), membership))


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raises DataError for a batch that does not hold what the losses need, or that has lost its images."""
    missing = {*TOKEN_MASKS, *FOR_THE_LOSSES, "labels"} - batch.keys()
    if not missing and "pixel_values" not in batch and batch["image_mask"].any():
        missing = {"pixel_values"}  # without them the model takes the image's tokens for words, without a word
    if missing:
        raise DataError(
            f"batch: {', '.join(sorted(missing))}: missing; expected a batch of Alignment.collate (give it as the "
            "data_collator), or of Alignment.adopt with all that the processor made"
        )


def split_batch(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inputs of the model and token masks (`TOKEN_MASKS`) of a batch; the rest is for the losses."""
    masks = {name: batch[name] for name in TOKEN_MASKS}
    inputs = {name: value for name, value in batch.items() if name not in (*TOKEN_MASKS, *FOR_THE_LOSSES)}
    return inputs, masks


def learning(batch: Mapping[str, Any]) -> torch.Tensor:
    """Which samples have a token to learn, bool `[B]`: all but those that only fill up the last batch of an epoch."""
    return batch["labels"].ne(IGNORED).any(1)


def pad_segments(segments: list[torch.Tensor]) -> torch.Tensor:
    """`[K, N]` of every sample -> `[B, K, N]`, with K and N of the largest."""
    tokens = max(segments_KN.shape[1] for segments_KN in segments)
    widened = [torch.nn.functional.pad(segments_KN, (0, tokens - segments_KN.shape[1])) for segments_KN in segments]
    return pad_sequence(widened, batch_first=True)
