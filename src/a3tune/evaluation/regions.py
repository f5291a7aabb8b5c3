"""Where the answer to a question is to be found: the data's own region, or weak labels where it has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from a3tune.config import LabelsConfig
from a3tune.errors import DataError
from a3tune.labels.make import LabelMaker, make_maker
from a3tune.labels.truth import truth_labels
from a3tune.masks import decode_mask
from a3tune.types import Sample

Source = Literal["true", "weak"]


def kind_of_regions(samples: Sequence[Sample]) -> Source:
    """`true` if any sample has a region of its own, else `weak`: one number never mixes both.

    Raises DataError if there is nothing to hide: no sample has a region, and none leaves it open.
    """
    if any(sample.regions for sample in samples):
        return "true"
    if any(sample.regions is None for sample in samples):
        return "weak"
    raise DataError(
        f"regions: expected some to hide, got an empty list for all {len(samples)} questions; draw some, or leave the "
        "field out for weak labels"
    )


@dataclass(frozen=True)
class RegionFinder:
    """Finds the region of each of some samples."""

    maker: LabelMaker | None
    """Of weak labels; None: the samples' own regions."""
    labels: LabelsConfig

    def settings(self) -> dict[str, Any]:
        """What the regions depend on, as `Hiding` has it."""
        if self.maker is None:
            return {"regions": "true"}
        asked = {"query": self.labels.query, "threshold": self.labels.threshold}
        return {"regions": "weak", "top_k": self.labels.top_k, "labels": self.maker.settings() | asked}

    def find(self, image: Image.Image, sample: Sample) -> NDArray[np.bool_] | None:
        """bool `[H, W]` of an RGB image: the union of the sample's regions, or of the segments that would guide its
        attention (Eq. 3); None if there is none. Raises LabelError, which names the sample."""
        if self.maker is None:
            found = truth_labels(sample, image.height, image.width)
        elif sample.regions is None:
            ranked = self.maker.find(image, sample)
            found = ranked.labels(sample.id, self.labels.top_k, self.labels.threshold)
        else:
            found = None
        if found is None or not found.segments:
            return None
        union = np.logical_or.reduce([decode_mask(segment.mask) for segment in found.segments])
        return union if union.any() else None


def region_finder(samples: Sequence[Sample], labels: LabelsConfig, device: str = "auto") -> RegionFinder:
    """For these samples. Raises what `kind_of_regions` and `make_maker` raise."""
    return RegionFinder(make_maker(labels, device) if kind_of_regions(samples) == "weak" else None, labels)
