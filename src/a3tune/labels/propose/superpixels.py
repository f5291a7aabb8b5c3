"""Segments from colours alone: no weights, no training. The embedded default."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.restoration import denoise_tv_chambolle
from skimage.segmentation import watershed

from a3tune.labels.propose.filters import Filters
from a3tune.masks import encode_changes, suppress
from a3tune.types import Rle, Segment

_DENOISING_STEPS = 30
_LEAST_WEIGHT = 0.01
"""Denoising weight where the image has no noise."""
_LEAST_VARIANCE = 4.0
"""Lab variance that the eye takes for even; keeps flat specks from winning."""


@dataclass(frozen=True, kw_only=True)
class Superpixels(Filters):
    """Regions that stay themselves longest while the superpixels of an image merge, most alike neighbours first.

    The image is denoised and cut into watershed basins of its gradient. Neighbours merge in the order of Ward's cost
    (the rise in squared Lab distance to the mean colour), which gives a tree from basins over lesions and organs to the
    whole body. A region's score is F / (1 + F), where F is the cost of merging it away over the colour variance inside
    it: near 1 for a region that is even in itself and unlike its surroundings. Its filters are more lenient than the
    published ones: small lesions stay, and so do organs that an image's frame cuts.

    Raises:
        ConfigError: a setting is of another type or outside its range.
    """

    name: ClassVar[str] = "superpixels"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Filters.ranges,
        "working_side": (16, 1024),
        "smoothing": (0.5, 10),
    }

    working_side: int = 128
    """Longest side in pixels, 16 to 1024, at which segments are sought; larger images are reduced to it first."""
    smoothing: float = 3.0
    """Weight of the total-variation denoising in units of the image's own noise level, 0.5 to 10."""
    min_side: float = 0.025
    min_area: float = 0.001
    max_area: float = 0.6
    max_frame: float = 0.25

    def __call__(self, image: Image.Image) -> list[Segment]:
        reduced = image.convert("RGB")
        reduced.thumbnail((self.working_side, self.working_side), Image.Resampling.BOX)
        basins, colours = _basins(np.asarray(reduced) / 255, self.smoothing)
        tree = _merge(basins, colours)
        large = self.right_size(tree.size / basins.size)
        nodes = np.flatnonzero(large)[np.argsort(-tree.score[large], kind="stable")]
        nodes = nodes[self.pass_filters(tree.size[nodes] / basins.size, *_extent(tree.holds[nodes], basins))]
        overlaps = _overlaps(tree.holds[nodes], tree.size[nodes])
        kept = nodes[suppress(overlaps, tree.score[nodes], self.max_overlap, self.max_segments)]
        return [Segment(_enlarged(tree.holds[node][basins], image.size), float(tree.score[node])) for node in kept]


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
        (x, y, z), (u, v, w) = mean[a], mean[b]
        gap = (x - u) ** 2 + (y - v) ** 2 + (z - w) ** 2
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
            near[other] -= {a, b}
            near[other].add(new)
            heapq.heappush(queue, ward(new, other))
    ratio = np.asarray(merged_at) / (np.asarray(spread) / np.asarray(size) + _LEAST_VARIANCE)
    return _Tree(np.stack(holds), np.asarray(size), ratio / (1 + ratio))


def _neighbours(basins: np.ndarray) -> list[set[int]]:
    """For each label of int [H, W] the labels that share an edge of a pixel with it."""
    count = int(basins.max()) + 1
    near: list[set[int]] = [set() for _ in range(count)]
    for one, other in ((basins[1:], basins[:-1]), (basins[:, 1:], basins[:, :-1])):
        border = one != other
        for pair in np.unique(one[border] * count + other[border]).tolist():
            a, b = divmod(pair, count)
            near[a].add(b)
            near[b].add(a)
    return near


def _extent(holds: np.ndarray, basins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of regions, bool [M, n] over the basins [H, W], what share of the shorter side their box has, and of the frame."""
    count = holds.shape[1]
    touched = [np.zeros((count, length), np.float32) for length in basins.shape]
    for touch, places in zip(touched, np.indices(basins.shape), strict=True):
        touch[basins, places] = 1
    side = np.minimum(*((holds @ touch > 0).sum(1) for touch in touched)) / min(basins.shape)
    frame = np.ones(basins.shape, bool)
    frame[1:-1, 1:-1] = False
    return side, holds @ np.bincount(basins[frame], minlength=count) / frame.sum()


def _overlaps(holds: np.ndarray, size: np.ndarray) -> Callable[[int], np.ndarray]:
    """IoU of one with all of regions, bool [M, n], of a tree: they lie in each other or apart."""
    one = holds.argmax(1)

    def overlaps(index: int) -> np.ndarray:
        nested = holds[:, one[index]] | holds[index, one]
        return np.where(nested, np.minimum(size, size[index]) / np.maximum(size, size[index]), 0)

    return overlaps


def _enlarged(mask: np.ndarray, size: tuple[int, int]) -> Rle:
    """RLE in an image of `size` (width, height) of a mask of the reduced image: each pixel takes its nearest.

    What changes down the columns is found in the reduced rows, of which there are few.
    """
    (rows, columns), (width, height) = mask.shape, size
    down = mask.T[np.arange(width) * columns // width].ravel()
    changes = np.flatnonzero(np.diff(down, prepend=False))
    first = -(-np.arange(rows) * height // rows)  # rows of the image that take each reduced row
    return encode_changes(changes // rows * height + first[changes % rows], (height, width))
