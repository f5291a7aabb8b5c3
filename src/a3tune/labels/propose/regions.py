"""Segments of real images without weights: large and compact regions of two merge trees."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from a3tune.labels.propose.superpixels import Superpixels
from a3tune.labels.propose.tree import Tree, enlarged, grow
from a3tune.types import Segment

_COARSER, _SMOOTHER = 0.75, 2.0
"""How the second tree is grown: at this share of the working side, with this many times the smoothing."""


@dataclass(frozen=True, kw_only=True)
class Regions(Superpixels):
    """The regions of `Superpixels` with two differences, for images with more in them than 64 segments can show.

    A score knows size and shape: it is q / (1 + q) with q = F^(1/3) * area^(1/2) * compactness, where compactness is 16
    area / perimeter^2, 1 for a square. Organs are larger and rounder than what merges by chance. And a second tree of
    coarser, smoother superpixels adds large regions, such as lungs, that ribs divide in the first one. The formula was
    found on slices of one CT and one MR and on chest radiographs (`benchmarks/proposers.py`).

    Raises:
        ConfigError: a setting is of another type or outside its range.
    """

    name: ClassVar[str] = "regions"

    large: float = 0.06
    """Smallest area of the second tree's regions as a share of the image, 0 to 1."""
    max_overlap: float = 0.7

    def __call__(self, image: Image.Image) -> list[Segment]:
        fine = grow(image, self.working_side, self.smoothing)
        coarse = grow(image, round(_COARSER * self.working_side), _SMOOTHER * self.smoothing)
        masks, scores = [], []
        for tree, least in ((fine, 0), (coarse, self.large)):
            score = _score(tree)
            for node in self.best(tree, score, least):
                masks.append(tree.mask(node))
                scores.append(float(score[node]))
        if not masks:
            return []
        alike = np.stack([_on_grid(mask, fine.basins.shape) for mask in masks])
        kept = self.distinct(alike, np.array(scores))
        return [Segment(enlarged(masks[index], image.size), scores[index]) for index in kept]


def _score(tree: Tree) -> np.ndarray:
    """Of each region of a tree, float [2n - 1]."""
    ratio = tree.score / (1 - tree.score)
    compactness = 16 * tree.size / tree.perimeter(np.arange(len(tree.size))) ** 2
    quality = np.cbrt(ratio) * np.sqrt(tree.size / tree.basins.size) * compactness
    return quality / (1 + quality)


def _on_grid(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of one reduced image on the grid of another: each pixel takes its nearest."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(shape, mask.shape, strict=True))
    return mask[rows][:, columns]
