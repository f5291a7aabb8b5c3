"""Image -> candidate segments (S* in section 4.1). Knows pixels, not questions.

A new proposer is one class with the three members of `Proposer` and one line in `PROPOSERS`.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.restoration import denoise_tv_chambolle
from skimage.segmentation import watershed

from a3tune.errors import ConfigError
from a3tune.labels import rle
from a3tune.types import Rle, Segment

_CANDIDATES_PER_SEGMENT = 4
"""Best-scored regions that go into the suppression of duplicates, per segment asked for."""
_DENOISING_STEPS = 30
_LEAST_WEIGHT = 0.01
"""Denoising weight where the image has no noise."""
_LEAST_VARIANCE = 4.0
"""Lab variance that the eye takes for even; keeps flat specks from winning."""


class Proposer(Protocol):
    """Finds the segments of an image that a question could be about."""

    name: ClassVar[str]
    """Key in `PROPOSERS`."""

    def settings(self) -> Mapping[str, object]:
        """Everything the segments depend on, as JSON values: the label store runs an image again when it changes."""
        ...

    def __call__(self, image: Image.Image) -> list[Segment]:
        """Segments of an RGB image in its own pixels, best score first; the same image gives the same segments."""
        ...


@dataclass(frozen=True, slots=True)
class Superpixels:
    """Regions that stay themselves longest while the superpixels of an image merge, most alike neighbours first.

    The image is denoised and cut into watershed basins of its gradient. Neighbours merge in the order of Ward's cost
    (the rise in squared Lab distance to the mean colour), which gives a tree from basins over lesions and organs to the
    whole body. A region's score is F / (1 + F), where F is the cost of merging it away over the colour variance inside
    it: near 1 for a region that is even in itself and unlike its surroundings. The filters below are those of the
    published code, as shares of the image so that they fit any size; its own values are in brackets.

    Raises:
        ConfigError: a setting is outside its range.
    """

    name: ClassVar[str] = "superpixels"

    working_side: int = 128
    """Longest side in pixels, 16 to 1024, at which segments are sought; larger images are reduced to it first."""
    smoothing: float = 3.0
    """Weight of the total-variation denoising in units of the image's own noise level, 0.5 to 10."""
    min_side: float = 0.025
    """Shortest side of a segment's box as a share of the image's shorter side, 0 to 1 (12/256 = 0.047)."""
    min_area: float = 0.001
    """Smallest area as a share of the image, 0 to 1."""
    max_area: float = 0.6
    """Largest area as a share of the image, 0 to 1 (40000/256^2 = 0.61)."""
    max_frame: float = 0.25
    """Largest share of the image's outermost pixels that a segment may hold, 0 to 1: keeps the background out (0)."""
    max_overlap: float = 0.8
    """Of two segments with a larger IoU the one with the lower score goes, 0 to 1 (0.8)."""
    max_segments: int = 64
    """At most so many, best scores first, 1 to 1000."""

    def __post_init__(self):
        limits = {"working_side": (16, 1024), "smoothing": (0.5, 10), "max_segments": (1, 1000)}
        for field, value in asdict(self).items():
            low, high = limits.get(field, (0, 1))
            if not low <= value <= high:
                raise ConfigError(f"superpixels: {field}: expected a number from {low} to {high}, got {value}")

    def settings(self) -> Mapping[str, object]:
        return {"name": self.name, **asdict(self)}

    def __call__(self, image: Image.Image) -> list[Segment]:
        reduced = image.convert("RGB")
        reduced.thumbnail((self.working_side, self.working_side), Image.Resampling.BOX)
        basins, colours = _basins(np.asarray(reduced) / 255, self.smoothing)
        tree = _merge(basins, colours)
        large = (tree.size >= self.min_area * basins.size) & (tree.size <= self.max_area * basins.size)
        nodes = np.flatnonzero(large)[np.argsort(-tree.score[large], kind="stable")]
        masks = tree.holds[nodes][:, basins]
        fits = self._fits(masks)
        candidates = slice(_CANDIDATES_PER_SEGMENT * self.max_segments)
        masks, scores = masks[fits][candidates], tree.score[nodes][fits][candidates]
        keep = rle.suppress(_overlaps(masks), scores, self.max_overlap)[: self.max_segments]
        return [Segment(_enlarged(masks[index], image.size), float(scores[index])) for index in keep]

    def _fits(self, masks: np.ndarray) -> np.ndarray:
        """Which of bool [M, H, W] are wide enough and do not run along the image's frame; bool [M]."""
        _, height, width = masks.shape
        frame = np.ones((height, width), dtype=bool)
        frame[1:-1, 1:-1] = False
        side = np.minimum(masks.any(1).sum(1), masks.any(2).sum(1)) / min(height, width)
        return (side >= self.min_side) & (masks[:, frame].mean(1) <= self.max_frame)


def _basins(pixels: np.ndarray, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """Watershed basins of an RGB image [H, W, 3] in [0, 1]: labels int [H, W] from 0, and the denoised Lab colours."""
    if min(pixels.shape[:2]) >= 3:
        weight = max(smoothing * _noise_level(pixels), _LEAST_WEIGHT)
        pixels = denoise_tv_chambolle(pixels, weight=weight, max_num_iter=_DENOISING_STEPS, channel_axis=-1)
    colours = rgb2lab(pixels)
    slope = np.hypot(ndimage.sobel(colours, 0), ndimage.sobel(colours, 1)).sum(-1)
    return np.maximum(watershed(slope), 1) - 1, colours  # an even image has no minimum: one basin


def _noise_level(pixels: np.ndarray) -> float:
    """Standard deviation of the noise of [H, W, 3]: median absolute response to a kernel that is blind to slopes.

    Immerkaer, "Fast noise variance estimation", CVIU 1996, with the median in place of the mean.
    """
    kernel = np.outer((1, -2, 1), (1, -2, 1)) / 6
    return float(np.median(np.abs(ndimage.convolve(pixels.mean(-1), kernel)))) / 0.6745


@dataclass(frozen=True, slots=True)
class _Tree:
    """The regions that appear while n basins merge into one: first the basins, then what is made of them."""

    holds: np.ndarray
    """bool [2n - 1, n]: the basins of each region."""
    size: np.ndarray
    """float [2n - 1]: pixels."""
    score: np.ndarray
    """float [2n - 1]: F / (1 + F); 0 for the root, which is never merged away."""


def _merge(basins: np.ndarray, colours: np.ndarray) -> _Tree:
    """Merge neighbouring regions of labels [H, W], cheapest first by the Ward cost of their colours [H, W, 3]."""
    flat, count = basins.ravel(), int(basins.max()) + 1
    pixels = np.bincount(flat)
    centre = np.stack([np.bincount(flat, channel.ravel()) / pixels for channel in np.moveaxis(colours, -1, 0)], axis=1)
    spread = np.bincount(flat, ((colours - centre[basins]) ** 2).sum(-1).ravel()).tolist()
    size, mean = pixels.astype(float).tolist(), centre.tolist()
    near = _neighbours(basins)

    def ward(a: int, b: int) -> tuple[float, int, int]:
        gap = sum((x - y) ** 2 for x, y in zip(mean[a], mean[b], strict=True))
        return gap * size[a] * size[b] / (size[a] + size[b]), a, b

    holds = [*np.eye(count, dtype=bool)]
    merged_at = [0.0] * (2 * count - 1)
    gone: set[int] = set()
    queue = [ward(a, b) for a in range(count) for b in near[a] if a < b]
    heapq.heapify(queue)
    while queue:
        cost, a, b = heapq.heappop(queue)
        if a in gone or b in gone:
            continue
        gone |= {a, b}
        merged_at[a] = merged_at[b] = cost
        new = len(size)
        mean.append([(x * size[a] + y * size[b]) / (size[a] + size[b]) for x, y in zip(mean[a], mean[b], strict=True)])
        spread.append(spread[a] + spread[b] + cost)
        size.append(size[a] + size[b])
        holds.append(holds[a] | holds[b])
        near.append((near[a] | near[b]) - {a, b})
        for other in near[new]:
            near[other] = near[other] - {a, b} | {new}
            heapq.heappush(queue, ward(new, other))
    ratio = np.asarray(merged_at) / (np.asarray(spread) / np.asarray(size) + _LEAST_VARIANCE)
    return _Tree(np.stack(holds), np.asarray(size), ratio / (1 + ratio))


def _neighbours(basins: np.ndarray) -> list[set[int]]:
    """For each label of int [H, W] the labels that share an edge of a pixel with it."""
    near: list[set[int]] = [set() for _ in range(int(basins.max()) + 1)]
    for one, other in ((basins[1:], basins[:-1]), (basins[:, 1:], basins[:, :-1])):
        border = one != other
        for a, b in np.unique(np.stack((one[border], other[border]), axis=1), axis=0).tolist():
            near[a].add(b)
            near[b].add(a)
    return near


def _overlaps(masks: np.ndarray) -> np.ndarray:
    """Intersection over union float32 [M, M] of bool [M, H, W]."""
    flat = masks.reshape(len(masks), masks[0].size if len(masks) else 0).astype(np.float32)
    shared = flat @ flat.T
    area = shared.diagonal()
    return shared / (area[:, None] + area - shared)


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> Rle:
    """RLE in an image of `size` (width, height) of a mask of the reduced image: each pixel takes its nearest."""
    width, height = size
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return rle.encode(mask.T[columns][:, rows].T)


PROPOSERS: dict[str, Callable[..., Proposer]] = {Superpixels.name: Superpixels}
"""Name -> class of a proposer; keyword arguments are its settings."""
