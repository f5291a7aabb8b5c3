"""Where a user says to look: a box, or a segment that the question picks. Knows pixels and questions, no VLM."""

import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a3tune.config import LabelsConfig
from a3tune.errors import DataError
from a3tune.labels.make import LabelMaker, RankedSegments, make_maker
from a3tune.masks import box_mask, decode_mask
from a3tune.types import Sample


@dataclass(frozen=True, eq=False)
class ChosenRegion:
    """Where the answer is to be found."""

    mask: NDArray[np.bool_]
    """bool `[H, W]` of the image."""
    name: str
    question: str = ""
    """The one that it answers; empty: it was drawn, for whatever is asked."""

    def answers(self, question: str) -> bool:
        """Whether what is said to a question can be scored against it."""
        return self.question in ("", question)


@dataclass(frozen=True, eq=False)
class Picks:
    """The segments of an image, and which of them a question picks."""

    question: str
    ranked: RankedSegments
    best: tuple[int, ...]
    """Indices of the top K, best first (Eq. 3)."""

    def mask(self, rank: int) -> NDArray[np.bool_]:
        """bool `[H, W]` of the segment of a rank, counted from 0."""
        return decode_mask(self.ranked.segments[self.best[rank]].mask)

    def region(self, rank: int) -> ChosenRegion:
        """That segment, for the question that picks it."""
        return ChosenRegion(self.mask(rank), f"segment {rank + 1}", self.question)


class Segmenter:
    """What makes labels; loaded when first asked, used by one at a time."""

    def __init__(self, settings: LabelsConfig, device: str = "auto") -> None:
        self._settings, self._device = settings, device
        self._busy = threading.Lock()

    @cached_property
    def _maker(self) -> LabelMaker:
        return make_maker(self._settings, self._device)

    def pick(self, image: Image.Image, question: str) -> Picks:
        """Segments of an RGB image, ranked by a question. Raises what `LabelMaker.find` raises."""
        with self._busy:
            ranked = self._maker.find(image, Sample("question", b"", question, "", "open"))
        best = ranked.best(self._settings.top_k, self._settings.threshold)
        return Picks(question, ranked, tuple(best.tolist()))


def box_region(corners: tuple[float | None, ...], image: Image.Image) -> ChosenRegion:
    """A box (left, top, right, bottom) in pixels of the image.

    Raises DataError for a missing number or a box without inside, LabelError for one outside the image.
    """
    if any(value is None for value in corners):
        raise DataError("box: expected four numbers (left, top, right, bottom); one is missing")
    left, top, right, bottom = (float(value or 0) for value in corners)
    if not (left < right and top < bottom):
        raise DataError(
            f"box: expected left < right and top < bottom, got left {left:g}, right {right:g}, top {top:g}, "
            f"bottom {bottom:g}"
        )
    return ChosenRegion(box_mask((left, top, right, bottom), image.height, image.width), "box")
