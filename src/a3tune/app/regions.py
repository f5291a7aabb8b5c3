"""Where a user says to look: a box, or a segment that the question picks. Knows pixels and questions, no VLM."""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a3tune.commands import proposer_and_ranker
from a3tune.config import LabelsConfig
from a3tune.errors import DataError
from a3tune.labels.rank import VISUAL_PROMPTS, format_query, top_k
from a3tune.labels.rle import box_mask, decode
from a3tune.types import Sample, Segment


@dataclass(frozen=True, eq=False)
class Picks:
    """The segments of an image, and which of them a question picks."""

    question: str
    segments: tuple[Segment, ...]
    similarity: NDArray[np.float32]
    """`[M]`: of each segment to the question."""
    best: tuple[int, ...]
    """Indices of the top K, best first (Eq. 3)."""

    def mask(self, rank: int) -> NDArray[np.bool_]:
        """bool `[H, W]` of the segment of a rank, counted from 0."""
        return decode(self.segments[self.best[rank]].mask)


class Segmenter:
    """The proposer and the ranker of `labels`; loaded when first asked, used by one at a time."""

    def __init__(self, settings: LabelsConfig, device: str = "auto") -> None:
        self._settings, self._device = settings, device
        self._busy = threading.Lock()
        self._parts = None

    def pick(self, image: Image.Image, question: str) -> Picks:
        """Segments of an RGB image, ranked by a question. Raises what proposers, rankers and `format_query` raise."""
        settings = self._settings
        query = format_query(settings.query, Sample("question", b"", question, "", "open"))
        show = VISUAL_PROMPTS[settings.visual_prompt]
        with self._busy:
            propose, ranker = self._parts = self._parts or proposer_and_ranker(settings, self._device)
            segments = propose(image)
            vectors = ranker.embed_images([show(image, decode(segment.mask)) for segment in segments])
            similarity = vectors @ ranker.embed_texts([query])[0]
        best = top_k(similarity, settings.top_k, settings.threshold)
        return Picks(question, tuple(segments), similarity, tuple(best.tolist()))


def box_region(corners: tuple[float | None, ...], image: Image.Image) -> NDArray[np.bool_]:
    """bool `[H, W]` of a box (left, top, right, bottom) in pixels of the image.

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
    return box_mask((left, top, right, bottom), image.height, image.width)
