"""The regions that appear while the superpixels of an image merge, most alike neighbours first. Knows no filters."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.restoration import denoise_tv_chambolle
from skimage.segmentation import watershed

from a3tune.masks import encode_changes
from a3tune.types import Rle

_DENOISING_STEPS = 30
_LEAST_WEIGHT = 0.01
"""Denoising weight where the image has no noise."""
_LEAST_VARIANCE = 4.0
"""Lab variance that the eye takes for even; keeps flat specks from winning."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The regions that appear while n basins merge into one: first the basins, then what is made of them."""

    basins: np.ndarray
    """int [H, W]: the basin of each pixel of the reduced image."""
    holds: np.ndarray
    """bool [2n - 1, n]: the basins of each region."""
    size: np.ndarray
    """float [2n - 1]: pixels."""
    score: np.ndarray
    """float [2n - 1]: F / (1 + F); 0 for the root, which is never merged away."""

    def mask(self, node: int) -> np.ndarray:
        """bool [H, W] of a region."""
        return self.holds[node][self.basins]

    def extent(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of regions [M], what share of the image's shorter side their box has, and of its frame they hold."""
        holds, count = self.holds[nodes], self.holds.shape[1]
        touched = [np.zeros((count, length), np.float32) for length in self.basins.shape]
        for touch, places in zip(touched, np.indices(self.basins.shape), strict=True):
            touch[self.basins, places] = 1
        side = np.minimum(*((holds @ touch > 0).sum(1) for touch in touched)) / min(self.basins.shape)
        frame = np.ones(self.basins.shape, bool)
        frame[1:-1, 1:-1] = False
        return side, holds @ np.bincount(self.basins[frame], minlength=count) / frame.sum()

    def perimeter(self, nodes: np.ndarray) -> np.ndarray:
        """Edges of pixels around regions [M], those on the image's frame included; float [M]."""
        holds, basins = self.holds[nodes], self.basins
        one, other, edges = _borders(basins)
        frame = np.concatenate((basins[0], basins[-1], basins[:, 0], basins[:, -1]))
        on_frame = np.bincount(frame, minlength=holds.shape[1])
        return (holds[:, one] != holds[:, other]) @ edges.astype(float) + holds @ on_frame

    def overlaps(self, nodes: np.ndarray) -> Callable[[int], np.ndarray]:
        """IoU [M] of one of regions [M], by its index, with all of them: they lie in each other or apart."""
        holds, size = self.holds[nodes], self.size[nodes]
        one = holds.argmax(1)

        def overlaps(index: int) -> np.ndarray:
            nested = holds[:, one[index]] | holds[index, one]
            return np.where(nested, np.minimum(size, size[index]) / np.maximum(size, size[index]), 0)

        return overlaps


def grow(image: Image.Image, side: int, smoothing: float) -> Tree:
    """The tree of an image, reduced to `side` pixels at most and denoised with `smoothing` times its own noise."""
    reduced = image.convert("RGB")
    reduced.thumbnail((side, side), Image.Resampling.BOX)
    return _merge(*_cut(np.asarray(reduced) / 255, smoothing))


def _cut(pixels: np.ndarray, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
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


def _merge(basins: np.ndarray, colours: np.ndarray) -> Tree:
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
    return Tree(basins, np.stack(holds), np.asarray(size), ratio / (1 + ratio))


def _neighbours(basins: np.ndarray) -> list[set[int]]:
    """For each label of int [H, W] the labels that share an edge of a pixel with it."""
    near: list[set[int]] = [set() for _ in range(int(basins.max()) + 1)]
    for a, b in zip(*(side.tolist() for side in _borders(basins)[:2]), strict=True):
        near[a].add(b)
        near[b].add(a)
    return near


def _borders(basins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of labels that touch, and along how many edges of pixels; int [B] each."""
    count = int(basins.max()) + 1
    sides = [(basins[1:], basins[:-1]), (basins[:, 1:], basins[:, :-1])]
    one, other = (np.concatenate([pair[end].ravel() for pair in sides]) for end in (0, 1))
    border = one != other
    low, high = np.minimum(one, other)[border], np.maximum(one, other)[border]
    pairs, edges = np.unique(low.astype(np.int64) * count + high, return_counts=True)
    return pairs // count, pairs % count, edges


def enlarged(mask: np.ndarray, size: tuple[int, int]) -> Rle:
    """RLE in an image of `size` (width, height) of a mask of the reduced image: each pixel takes its nearest.

    What changes down the columns is found in the reduced rows, of which there are few.
    """
    (rows, columns), (width, height) = mask.shape, size
    down = mask.T[np.arange(width) * columns // width].ravel()
    changes = np.flatnonzero(np.diff(down, prepend=False))
    first = -(-np.arange(rows) * height // rows)  # rows of the image that take each reduced row
    return encode_changes(changes // rows * height + first[changes % rows], (height, width))
