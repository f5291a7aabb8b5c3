"""Which candidates are worth keeping: the filters that all proposers share. Knows masks, not where they come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import numpy as np

from a3tune.errors import ConfigError
from a3tune.masks import suppress


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Limits on the segments of an image, as shares of it so that they fit any size; the base of every proposer.

    Defaults are those of the published code, which works on images of 256 x 256 pixels: sides of at most 12 pixels,
    areas of 40,000 pixels or more, what touches the border, and duplicates go.

    Raises:
        ConfigError: a setting is of another type or outside its range.
    """

    name: ClassVar[str]
    """Key of the proposer in `PROPOSERS`."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"max_segments": (1, 1000)}
    """Lowest and highest value of a setting; 0 to 1 for what is not listed."""

    min_side: float = 12 / 256
    """Shortest side of a segment's box as a share of the image's shorter side, 0 to 1."""
    min_area: float = 0.0
    """Smallest area as a share of the image, 0 to 1."""
    max_area: float = 40_000 / 256**2
    """Largest area as a share of the image, 0 to 1."""
    max_frame: float = 0.0
    """Largest share of the image's outermost pixels that a segment may hold, 0 to 1: keeps the background out."""
    max_overlap: float = 0.8
    """Of two segments with a larger IoU the one with the lower score goes, 0 to 1."""
    max_segments: int = 64
    """Most segments of an image, best scores first, 1 to 1000; the published code has no such limit."""

    def __post_init__(self):
        for field in fields(self):
            if field.type not in (int, float):
                continue
            value, (low, high) = getattr(self, field.name), self.ranges.get(field.name, (0, 1))
            kind, types = ("an integer", int) if field.type is int else ("a number", int | float)
            if not isinstance(value, types) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{self.name}: {field.name}: expected {kind} from {low} to {high}, got {value!r}")

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        """Travels to another process as its settings: a model is loaded where it is used."""
        return partial(type(self), **{field.name: getattr(self, field.name) for field in fields(self)}), ()

    def settings(self) -> Mapping[str, object]:
        """Name and numbers; a proposer with weights adds their content."""
        numbers = {field.name: getattr(self, field.name) for field in fields(self) if field.type in (int, float)}
        return {"name": self.name, **numbers}

    def right_size(self, share: np.ndarray) -> np.ndarray:
        """Which areas, as shares of the image, are neither too small nor too large; bool of the same shape."""
        return (share >= self.min_area) & (share <= self.max_area)

    def fit(self, masks: np.ndarray) -> np.ndarray:
        """Which of bool [M, H, W] are of the right size, wide enough and off the image's frame; bool [M]."""
        _, height, width = masks.shape
        frame = np.ones((height, width), dtype=bool)
        frame[1:-1, 1:-1] = False
        side = np.minimum(masks.any(1).sum(1), masks.any(2).sum(1)) / min(height, width)
        return self.pass_filters(masks.sum((1, 2)) / (height * width), side, masks[:, frame].mean(1))

    def pass_filters(self, area: np.ndarray, side: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """Which segments `fit` keeps, bool [M], by their shares of the image [M] that the limits are about."""
        return self.right_size(area) & (side > 0) & (side >= self.min_side) & (frame <= self.max_frame)

    def distinct(self, masks: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Indices of the best of bool [M, H, W] by scores [M] without duplicates, best first; int [<= max_segments]."""
        packed = np.packbits(masks.reshape(len(masks), np.prod(masks.shape[1:], dtype=int)), axis=1)
        bits = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)

        def pixels(bits: np.ndarray) -> np.ndarray:
            return np.bitwise_count(bits).sum(1, dtype=np.int64)

        area = pixels(bits)

        def overlaps(index: int) -> np.ndarray:
            shared = pixels(bits & bits[index])
            return shared / (area + area[index] - shared)

        return suppress(overlaps, scores, self.max_overlap, self.max_segments)
