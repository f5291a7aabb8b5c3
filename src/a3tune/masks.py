"""Binary masks as COCO RLE, boxes, overlap and non-maximum suppression. Knows pixels only.

Masks are bool `[H, W]`; boxes are `(x0, y0, x1, y1)` in pixels, x1 and y1 exclusive.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

from a3tune.errors import LabelError
from a3tune.types import Box, Region, Rle

_LONGEST_NUMBER = 7
"""Groups of 5 bits that a 32-bit run length needs."""
MAX_COUNTS = 2**23
"""Letters of a run-length code; one of an image of 80 million pixels has some thousands, of pure noise more."""
_PIECE = 2**18
"""Letters of it that are decoded at once: some 60 bytes each meanwhile."""


def encode_mask(mask: np.ndarray) -> Rle:
    """Compress a mask [H, W] (any dtype: what is not zero is inside); fastest if it is laid out column by column."""
    height, width = mask.shape
    counts: Any = coco.encode(np.asfortranarray(mask != 0, dtype=np.uint8))["counts"]
    return Rle((height, width), counts.decode("ascii"))


def encode_changes(places: np.ndarray, size: tuple[int, int]) -> Rle:
    """RLE of `size` (height, width) of a mask by where, down its columns, it begins and ends; int [N], rising."""
    height, width = size
    runs = np.diff(places, prepend=0, append=height * width)
    counts: Any = coco.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width)["counts"]
    return Rle(size, counts.decode("ascii"))


def decode_mask(rle: Rle) -> np.ndarray:
    """Mask bool [H, W] of an RLE.

    Raises:
        LabelError: `counts` is no COCO RLE of `size`.
    """
    height, width = rle.size
    lengths = _run_lengths(rle)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(width, height).T


def area(rle: Rle) -> int:
    """Pixels inside the mask."""
    return int(_run_lengths(rle)[1::2].sum())


def bounding_box(rle: Rle) -> Box:
    """Smallest box around the mask; (0, 0, 0, 0) if the mask is empty."""
    x, y, width, height = coco.toBbox(_checked(rle)).tolist()
    return (x, y, x + width, y + height) if width and height else (0.0, 0.0, 0.0, 0.0)


def box_of(corners: Iterable[float]) -> Box:
    """Four numbers as a box. Raises ValueError, which says what was expected of them."""
    x0, y0, x1, y1 = box = tuple(map(float, corners))
    if not all(map(math.isfinite, box)):
        raise ValueError("expected finite numbers")
    if not (x0 < x1 and y0 < y1):
        raise ValueError("expected x0 < x1 and y0 < y1 (corners, not width and height)")
    if min(box) >= 0 and max(box) <= 1 and any(side % 1 for side in box):
        raise ValueError("expected pixels of the image, not shares of its width and height")
    return x0, y0, x1, y1


def box_mask(box: Box, height: int, width: int) -> np.ndarray:
    """Mask bool [H, W] of every pixel that the box touches; what lies outside the image is cut off.

    Raises:
        LabelError: the box and the image do not overlap.
    """
    x0, y0, x1, y1 = box
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise LabelError(
            f"box {box}: expected some of it inside the image of {width} x {height} pixels, all is outside"
        )
    mask = np.zeros((height, width), dtype=bool)
    mask[max(0, math.floor(y0)) : math.ceil(y1), max(0, math.floor(x0)) : math.ceil(x1)] = True
    return mask


def region_mask(region: Region, height: int, width: int) -> np.ndarray:
    """Mask bool [H, W] of a region of an image of this size.

    Raises:
        LabelError: the mask is damaged or of another size, or the box lies outside the image.
    """
    if region.mask is None:
        if region.box is None:
            raise LabelError(f"region {region.name!r}: expected a mask or a box, got neither")
        return box_mask(region.box, height, width)
    if region.mask.size != (height, width):
        mask_height, mask_width = region.mask.size
        raise LabelError(
            f"region {region.name!r}: expected a mask of the image's {width} x {height} pixels, "
            f"got one of {mask_width} x {mask_height} (rle.size is [height, width])"
        )
    return decode_mask(region.mask)


def mask_iou(first: Sequence[Rle], second: Sequence[Rle]) -> np.ndarray:
    """Intersection over union float64 [A, B] of masks of one image."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    overlap = coco.iou([_checked(rle) for rle in first], [_checked(rle) for rle in second], [0] * len(second))
    return np.asarray(overlap, dtype=np.float64)


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union float64 [A, B] of boxes [A, 4] and [B, 4]; 0 where both boxes are empty."""
    a, b = np.asarray(first, np.float64).reshape(-1, 1, 4), np.asarray(second, np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.clip(sides, 0, None).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def suppress(
    overlaps: Callable[[int], np.ndarray], scores: np.ndarray, threshold: float, most: int | None = None
) -> np.ndarray:
    """Non-maximum suppression: indices of what is kept, best score first and `most` at most; of equals the earlier one.

    `overlaps(index)` gives the IoU [M] of one item with every item, only asked for those that are kept; for a matrix of
    `mask_iou` or `box_iou` it is `iou.__getitem__`. `scores` is [M]. Whatever overlaps a better kept one by more than
    `threshold` goes.
    """
    free = np.ones(len(scores), dtype=bool)
    kept: list[int] = []
    for index in np.argsort(-np.asarray(scores), kind="stable").tolist():
        if len(kept) == most:
            break
        if free[index]:
            kept.append(index)
            free &= overlaps(index) <= threshold
    return np.asarray(kept, dtype=np.int64)


def _checked(rle: Rle) -> Any:
    """What pycocotools takes. It writes outside its memory if the counts are damaged, so they are checked first."""
    _run_lengths(rle)
    return {"size": list(rle.size), "counts": rle.counts.encode("ascii")}


def _run_lengths(rle: Rle) -> np.ndarray:
    """Pixels of each run, int64, down the columns: outside, inside, outside, ...; their sum is H * W."""
    height, width = rle.size
    # A run is at least a pixel long, and what stands for it no longer than twice that.
    if len(rle.counts) > min(MAX_COUNTS, 2 * height * width + 2 * _LONGEST_NUMBER):
        raise LabelError(
            f"RLE {rle.counts[:40]!r}: has {len(rle.counts):,} letters, too many for {width} x {height} pixels"
        )
    lengths = _decode_counts(rle.counts)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise LabelError(f"RLE {rle.counts[:40]!r}: expected COCO's compressed runs of {width} x {height} pixels")
    return lengths


def _decode_counts(counts: str) -> np.ndarray:
    """Numbers int64 from COCO's 6-bit characters; empty if they are no such code.

    A number is signed, in groups of 5 bits, lowest first; bit 5 says that another group follows, bit 4 of the last
    group is the sign. From the fourth number on, it is the difference to the number before the previous one.
    """
    codes = np.frombuffer(counts.encode("ascii", "replace"), dtype=np.uint8)
    if not codes.size or ((codes - ord("0")) > 0x3F).any() or (codes[-1] - ord("0")) & 0x20:
        return np.zeros(0, np.int64)
    pieces: list[np.ndarray] = []
    start = 0
    while start < codes.size:
        end = min(start + _PIECE, codes.size)
        # Not in the middle of a number; one that is too long is told from its first letters.
        while end < min(codes.size, start + _PIECE + _LONGEST_NUMBER) and (codes[end - 1] - ord("0")) & 0x20:
            end += 1
        piece = _decode_piece(codes[start:end])
        if piece is None:
            return np.zeros(0, np.int64)
        pieces.append(piece)
        start = end
    numbers = np.concatenate(pieces)
    del pieces
    numbers[1::2].cumsum(out=numbers[1::2])
    numbers[2::2].cumsum(out=numbers[2::2])
    return numbers


def _decode_piece(letters: np.ndarray) -> np.ndarray | None:
    """Numbers int64 of letters, uint8, that end with one; None if one of them is too long."""
    codes = letters.astype(np.int64) - ord("0")
    more = codes & 0x20 != 0
    starts = np.flatnonzero(np.concatenate(([True], ~more[:-1])))
    groups = np.diff(starts, append=codes.size)
    if groups.max() > _LONGEST_NUMBER:
        return None
    place = np.arange(codes.size) - np.repeat(starts, groups)
    numbers = np.add.reduceat((codes & 0x1F) << (5 * place), starts)
    negative = codes[starts + groups - 1] & 0x10 != 0
    return numbers - (negative.astype(np.int64) << (5 * groups))
