"""How good weak labels are, where the true regions are known. Knows masks, not how labels were made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from a3tune.masks import area, decode_mask, encode_mask, mask_iou, region_mask
from a3tune.types import Labels, Sample

_LEAST_PART = 0.05
"""Share of a region's area from which one of its connected parts counts by itself."""
MIN_IOU = 0.5
"""Overlap from which a weak label counts as the true region."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over the true regions of a group of samples; IoU is intersection over union.

    A region of several connected parts, as both lungs, counts as these: one segment finds one of them, or all those of
    which it covers at least half.
    """

    samples: int
    """Samples with at least one true region; all others are left out."""
    recall: float
    """Share of regions that one of the top-K segments meets with the asked-for IoU."""
    best_iou: float
    """Mean of the best IoU among the top-K."""
    ceiling_recall: float
    """The same share among all proposals: what a perfect ranking would reach."""
    ceiling_iou: float
    """Mean of the best IoU among all proposals."""
    precision: float
    """Mean over samples of the share of the top-K's area that lies inside a true region."""


def label_quality(
    samples: Iterable[Sample],
    ranked: Callable[[Sample], Labels],
    *,
    top_k: int = 4,
    min_iou: float = MIN_IOU,
    by: Sequence[str] = (),
) -> dict[str, Quality]:
    """Compare weak labels with the samples' own regions.

    Args:
        samples: those without regions are skipped.
        ranked: all segments of a sample, best first, e.g. `lambda sample: store.labels(sample, top_k=None)`.
        top_k: K, the segments that would guide the attention.
        min_iou: IoU in [0, 1] from which a region counts as found.
        by: `meta` fields to break the result down by; samples without a field are in none of its groups.

    Returns:
        "all", and "FIELD=VALUE" for every value of these fields. Empty if no sample has regions.

    Raises:
        LabelError: a region does not fit its image, or a sample has no labels.
    """
    groups: dict[str, list[_Overlap]] = {}
    for sample in samples:
        if sample.regions:
            overlap = _compare(sample, ranked(sample), top_k)
            for group in ["all", *(f"{field}={sample.meta[field]}" for field in by if field in sample.meta)]:
                groups.setdefault(group, []).append(overlap)
    return {group: _summary(items, min_iou) for group, items in groups.items()}


@dataclass(frozen=True, slots=True)
class _Overlap:
    best_top: np.ndarray
    """Best IoU of each part of a true region among the top-K, float [parts]."""
    best_all: np.ndarray
    precision: float


def _compare(sample: Sample, labels: Labels, top_k: int) -> _Overlap:
    assert sample.regions
    if not labels.segments:
        nothing = np.zeros(
            sum(len(_parts(decode_mask(region.mask))) if region.mask else 1 for region in sample.regions)
        )
        return _Overlap(nothing, nothing, 0.0)
    height, width = labels.segments[0].mask.size
    truth = [region_mask(region, height, width) for region in sample.regions]
    overlap = np.concatenate([_overlap(mask, labels) for mask in truth])
    top = np.any([decode_mask(segment.mask) for segment in labels.segments[:top_k]], axis=0)
    inside = np.any(truth, axis=0) & top
    return _Overlap(overlap[:, :top_k].max(1), overlap.max(1), float(inside.sum() / max(1, top.sum())))


def _overlap(mask: np.ndarray, labels: Labels) -> np.ndarray:
    """IoU [parts, segments] of each part of a region: with the part, or with all of it if half the part is inside."""
    pieces = [encode_mask(piece) for piece in (mask, *_parts(mask))]
    segments = [segment.mask for segment in labels.segments]
    whole, *rest = mask_iou(pieces, segments)
    parts = np.asarray(rest)
    size = np.array([[area(piece)] for piece in pieces[1:]])
    shared = parts * (size + [area(segment) for segment in segments]) / (1 + parts)
    return np.where(shared >= 0.5 * size, np.maximum(parts, whole), parts)


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a region, such as two lungs; specks of it are none."""
    from scipy import ndimage

    places, count = ndimage.label(mask, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    sizes = np.bincount(places.ravel(), minlength=count + 1)[1:]
    large = np.flatnonzero(sizes >= _LEAST_PART * sizes.sum()) + 1 if count else []
    return [places == number for number in large] or [mask]


def _summary(items: list[_Overlap], min_iou: float) -> Quality:
    best_top = np.concatenate([item.best_top for item in items])
    best_all = np.concatenate([item.best_all for item in items])
    return Quality(
        samples=len(items),
        recall=float((best_top >= min_iou).mean()),
        best_iou=float(best_top.mean()),
        ceiling_recall=float((best_all >= min_iou).mean()),
        ceiling_iou=float(best_all.mean()),
        precision=float(np.mean([item.precision for item in items])),
    )
