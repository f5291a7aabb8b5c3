"""What training scripts of others have in hand -> what the losses take: rows in memory, batches of other collators.

Knows rows, regions and tokens; no losses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from a3tune.adapters.routing import is_markup
from a3tune.data.images import load_image
from a3tune.data.memory import ImageLike, image_source, rows_of
from a3tune.errors import DataError, LabelError, shown
from a3tune.evaluation.answer import RegionLike, as_region
from a3tune.labels.truth import truth_labels
from a3tune.training.collate import IGNORED, on_tokens, pad_segments
from a3tune.types import Labels, Region, Sample
from a3tune.vlm.grids import token_boxes
from a3tune.vlm.load import Vlm

Rows = Iterable[Mapping[str, Any] | Sample]
"""Mappings with the public fields of a row (`data/rows.py`), images and regions as in memory; or samples."""
RegionsLike = Labels | Iterable[RegionLike] | None
"""Where to look in one image: labels, or boxes, masks and regions; None: nobody said."""


def samples_of(rows: Rows, regions: Sequence[RegionsLike] | None = None) -> list[Sample]:
    """Samples of rows; where each looks is what its row says, or what `regions` say in its place.

    Raises DataError for a row and LabelError for a region that is none.
    """
    listed = list(rows)
    if regions is not None:
        if len(regions) != len(listed):
            raise DataError(f"regions: expected one entry for each of the {len(listed)} rows, got {len(regions)}")
        bare = rows_of([_without_regions(row) for row in listed])
        return [_looking(sample, given) for sample, given in zip(bare, regions, strict=True)]
    own = [_in_memory(row) for row in listed]
    bare = rows_of([row if given is None else _without_regions(row) for row, given in zip(listed, own, strict=True)])
    return [sample if given is None else _looking(sample, given) for sample, given in zip(bare, own, strict=True)]


def adopt(
    vlm: Vlm,
    batch: Mapping[str, Any],
    images: Sequence[ImageLike],
    regions: Sequence[RegionsLike],
    membership: float,
) -> dict[str, Any]:
    """A batch that another collator made, with the token masks and segments that the losses need.

    Args:
        batch: `input_ids`, `labels` (-100 but on the answer) and, where it is padded, `attention_mask`, int64 `[B, S]`;
            and whatever else the model takes.
        images: one per sample, as the processor was given it.
        regions: where to look in each.
        membership: as of `Collator`.

    Raises DataError for a batch that does not say where the answer is, or whose images are others.
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
        raise DataError(
            "batch: expected the tensors `input_ids` and `labels` of one shape, `labels` -100 but on the answer"
        )
    if not len(ids) == len(images) == len(regions):
        raise DataError(
            f"batch: expected as many samples, images and entries of regions, got {len(ids)}, {len(images)} and "
            f"{len(regions)}"
        )
    real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    image_mask = real & (ids == vlm.model.config.image_token_id)
    answer_mask = labels.ne(IGNORED)
    before = _before_answers(answer_mask, image_mask)
    markup = is_markup(ids, image_mask, vlm.control_ids, vlm.layout_ids)
    placed_mask, segments = image_mask.clone(), []
    for index, (one, given) in enumerate(zip(images, regions, strict=True)):
        image = one if isinstance(one, Image) else load_image(image_source(one))
        boxes = token_boxes(vlm, image.height, image.width)
        if (tokens := int(image_mask[index].sum())) != len(boxes):
            raise DataError(
                f"batch[{index}]: expected {len(boxes)} image tokens of one image of {image.width} x {image.height} "
                f"pixels, got {tokens}; give the image that the processor was given, and cut no text"
            )
        sample = _looking(Sample(f"batch[{index}]", b"", "", "", "open"), given, image)
        size = (image.height, image.width)
        segments.append(on_tokens(sample, truth_labels(sample, *size), boxes, size, membership))
        placed_mask[index, image_mask[index]] = ~torch.from_numpy(boxes[:, 0]).isnan().to(ids.device)
    return {
        **batch,
        "image_mask": image_mask,
        "prompt_mask": real & before & ~image_mask & ~markup,
        "answer_mask": answer_mask,
        "placed_mask": placed_mask,
        "segments": pad_segments(segments),
        "sample_ids": [f"batch[{index}]" for index in range(len(ids))],
    }


def _before_answers(answer_mask: Tensor, image_mask: Tensor) -> Tensor:
    """bool `[B, S]`: positions in front of the answer, all of them where there is none.

    Raises DataError for a sample with several answers, or one that begins before its image ends.
    """
    position = torch.arange(answer_mask.shape[1], device=answer_mask.device)
    first = torch.where(answer_mask.any(1), answer_mask.int().argmax(1), answer_mask.shape[1])
    before = position < first[:, None]
    runs = (answer_mask[:, 1:] & ~answer_mask[:, :-1]).sum(1) + answer_mask[:, 0]
    for index in ((runs > 1) | (image_mask & ~before).any(1)).nonzero()[:1].flatten().tolist():
        raise DataError(
            f"batch[{index}]: labels: expected one answer behind the image and -100 everywhere else, got {runs[index]} "
            "stretches that are learnt; learn the completion only (TRL: completion_only_loss), one turn at a time"
        )
    return before


def _in_memory(row: Mapping[str, Any] | Sample) -> Any:
    """The regions of a row that are not in the form of rows of a file."""
    regions = row.get("regions") if isinstance(row, Mapping) else None
    if regions is None or (isinstance(regions, list) and all(isinstance(region, Mapping) for region in regions)):
        return None
    return regions


def _without_regions(row: Mapping[str, Any] | Sample) -> Mapping[str, Any] | Sample:
    if isinstance(row, Sample):
        return row
    return {name: value for name, value in row.items() if name != "regions"}


def _looking(sample: Sample, regions: RegionsLike, image: Image | None = None) -> Sample:
    if regions is None:
        return replace(sample, regions=None)
    if isinstance(regions, Labels):
        return replace(sample, regions=tuple(Region(mask=segment.mask) for segment in regions.segments))
    if not isinstance(regions, Iterable):
        raise LabelError(f"sample {sample.id}: regions: expected a list of boxes or masks, got {shown(regions)}")
    given = list(regions)
    if all(isinstance(region, Region) for region in given):
        return replace(sample, regions=tuple(given))
    seen = load_image(sample.image) if image is None else image
    try:
        return replace(sample, regions=tuple(as_region(region, seen) for region in given))
    except LabelError as error:
        raise LabelError(f"sample {sample.id}: regions: expected a list of boxes or masks: {error}") from error
