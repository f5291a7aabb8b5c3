"""Mask -> image tokens, and token map -> picture. Knows boxes and pixels, no model.

A token with a box of NaN has no place in the image: nothing of it is covered, and nothing is painted for it.
"""

import numpy as np


def token_weights(mask: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Covered fraction of every image token's box, exact for boxes with fractional edges.

    Args:
        mask: bool `[H, W]`, or `[..., H, W]` for several masks of one image.
        boxes: float `[N, 4]`, x0, y0, x1, y1 in pixels of that image (`vlm.grids.token_boxes`).

    Returns float32 `[N]` (or `[..., N]`) in [0, 1]; what lies outside the image counts as not covered.
    """
    height, width = mask.shape[-2:]
    boxes = _placed(boxes)
    # Boxes of a grid share their rows: one product per row of tokens, not per token.
    rows, row_of_box = np.unique(boxes[:, [1, 3]], axis=0, return_inverse=True)
    y_overlap = _overlap(rows[:, 0], rows[:, 1], height)
    x_overlap = _overlap(boxes[:, 0], boxes[:, 2], width)
    row_sums = y_overlap @ mask.astype(np.float64)
    covered = np.einsum("...nw,nw->...n", row_sums[..., row_of_box.ravel(), :], x_overlap)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.clip(covered / np.where(areas > 0, areas, 1), 0, 1).astype(np.float32)


def members(weights: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Which image tokens belong to a segment: "c in s" of Eq. 10.

    1 where the covered fraction `weights` (float `[..., N]`) is at least `threshold`. The best covered token of a
    segment always belongs to it, so that a lesion smaller than a patch does not vanish; a segment outside the model's
    view has no token.

    Returns float32 `[..., N]` of zeros and ones.
    """
    best = weights.max(axis=-1, keepdims=True)
    return ((weights > 0) & ((weights >= threshold) | (weights == best))).astype(np.float32)


def paint(values: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Lay values of image tokens back on the image's pixels; the inverse of `token_weights`, for pictures.

    A pixel gets the mean of the tokens that see it, weighted by how much of the pixel each sees; 0 where none
    sees it.

    Args:
        values: float `[N]`.
        boxes: float `[N, 4]` in pixels of the image.
        size: height and width of the image.

    Returns float32 `[H, W]`.
    """
    height, width = size
    boxes = _placed(boxes)
    y_overlap = _overlap(boxes[:, 1], boxes[:, 3], height)
    x_overlap = _overlap(boxes[:, 0], boxes[:, 2], width)
    seen = y_overlap.T @ x_overlap
    total = (y_overlap * np.asarray(values, np.float32)[:, None]).T @ x_overlap
    return np.divide(total, seen, out=np.zeros((height, width), np.float32), where=seen > 1e-6)


def _overlap(start: np.ndarray, end: np.ndarray, size: int) -> np.ndarray:
    """Length of every pixel `[p, p + 1]` that lies in `[start, end]`: float64 `[len(start), size]`."""
    pixel = np.arange(size)
    overlap = np.minimum(end[:, None], pixel + 1) - np.maximum(start[:, None], pixel)
    return np.clip(overlap, 0, None)


def _placed(boxes: np.ndarray) -> np.ndarray:
    """The boxes with empty ones, which overlap no pixel, for the tokens without a place."""
    return np.nan_to_num(boxes, nan=0.0)
