"""Image and question -> segments ranked by the question (Eq. 3), in memory. What a label store keeps is made here.

Knows proposers, rankers and visual prompts; no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from a3tune.config import LabelsConfig
from a3tune.labels.fetch import model_folder
from a3tune.labels.propose import Proposer, make_proposer
from a3tune.labels.rank import (
    Ranker,
    check_visual_prompt,
    format_query,
    make_ranker,
    show_each,
    top_k,
)
from a3tune.masks import decode_mask
from a3tune.types import Labels, Sample, Segment


@dataclass(frozen=True, slots=True, eq=False)
class RankedSegments:
    """All segments of an image, and how similar each is to a question."""

    segments: tuple[Segment, ...]
    similarity: np.ndarray
    """float32 [M]: cosine of each segment to the question."""

    def best(self, k: int | None, threshold: float | None = None) -> np.ndarray:
        """Indices of the segments that guide the attention, best first (`rank.top_k` says what K and tau do)."""
        return top_k(self.similarity, k, threshold)

    def labels(self, sample_id: str, k: int | None, threshold: float | None = None) -> Labels:
        """The segments that guide the attention for a sample, best first (Eq. 3)."""
        best = self.best(k, threshold)
        return Labels(sample_id, tuple(self.segments[i] for i in best), tuple(float(self.similarity[i]) for i in best))


@dataclass(frozen=True)
class LabelMaker:
    """Finds segments and ranks them. Raises ConfigError when there is no such visual prompt."""

    proposer: Proposer
    ranker: Ranker
    visual_prompt: str = "dim"
    """How a segment is shown to the ranker: a name in `rank.VISUAL_PROMPTS`."""
    query: str = "{question}"
    """What the ranker reads (`rank.format_query`)."""

    def __post_init__(self) -> None:
        check_visual_prompt(self.visual_prompt)

    def settings(self) -> dict[str, Any]:
        """Everything that segments and similarities depend on but the query, as JSON values."""
        return {
            "proposer": self.proposer.settings(),
            "visual_prompt": self.visual_prompt,
            "ranker": self.ranker.settings(),
        }

    def embed_segments(self, image: Image.Image, segments: Sequence[Segment]) -> np.ndarray:
        """Unit vectors float16 [M, E] of the segments of an RGB image, as stores keep them."""
        masks = (decode_mask(segment.mask) for segment in segments)
        shown = show_each(self.visual_prompt, image, masks)
        if not getattr(self.ranker, "takes_grey", False):
            shown = [picture.convert("RGB") for picture in shown]
        return self.ranker.embed_images(shown).astype(np.float16)

    def embed_query(self, query: str) -> np.ndarray:
        """Unit vector float32 [E].

        Texts are embedded one by one: in a batch the last bits of a vector depend on the other texts, and a store would
        depend on where its making was interrupted.
        """
        return self.ranker.embed_texts([query])[0]

    def find(self, image: Image.Image, sample: Sample) -> RankedSegments:
        """Segments of an RGB image, ranked by a sample's question: what a store of the same settings would hold.

        Raises what proposers, rankers and `format_query` raise.
        """
        query = format_query(self.query, sample)
        segments = tuple(self.proposer(image))
        return RankedSegments(segments, similarity(self.embed_segments(image, segments), self.embed_query(query)))


def similarity(segments_ME: np.ndarray, query_E: np.ndarray) -> np.ndarray:
    """Cosine float32 [M] of unit vectors."""
    return segments_ME.astype(np.float32) @ query_E


def make_maker(settings: LabelsConfig, device: str = "auto") -> LabelMaker:
    """What `a3tune label` makes labels with; `device` as `model.device`.

    Models of the Hugging Face Hub are downloaded (`fetch.model_folder`). Raises what that, `make_proposer` and
    `make_ranker` raise.
    """
    return LabelMaker(
        make_proposer(
            settings.proposer, settings.weights and model_folder(settings.weights), settings.proposal, device
        ),
        make_ranker(model_folder(settings.ranker), device),
        settings.visual_prompt,
        settings.query,
    )
