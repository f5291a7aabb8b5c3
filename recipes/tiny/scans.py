"""Phantom patients for pretraining, never those of a demo data set: they come from a seed stream of their own."""

from functools import cache

import numpy as np
from tqdm import tqdm

from a3tune.data.phantom.scan import Scan, make_scan

PRETRAINING_STREAM = 9
"""Demo data sets use streams 1 to 3 of `a3tune.data.phantom.dataset`."""
AMBIENT = 0.2
"""Light outside a lit region."""


@cache
def pretraining_scans(count: int, first: int = 0) -> list[Scan]:
    """The scans number `first` to `first + count - 1`."""
    return [make_scan((0, PRETRAINING_STREAM, number)) for number in tqdm(range(first, first + count), "scans")]


def lit(image: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The image with a fifth of its light outside the region, uint8 [side, side]."""
    return np.where(region, image, (image * AMBIENT).astype(np.uint8))


def pixel_values(images: list[np.ndarray], mean: list[float], std: list[float]) -> np.ndarray:
    """Normalised float32 [images, 3, side, side], as the processor makes them of an image of the model's own size."""
    grey = np.stack(images).astype(np.float32)[:, None] / 255
    shape = (1, 3, 1, 1)
    return (grey - np.float32(mean).reshape(shape)) / np.float32(std).reshape(shape)
