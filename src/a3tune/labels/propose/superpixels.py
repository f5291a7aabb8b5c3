"""Segments from colours alone: no weights, no training. The embedded default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from a3tune.labels.propose.filters import Filters
from a3tune.labels.propose.tree import Tree, enlarged, grow
from a3tune.masks import suppress
from a3tune.types import Segment


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
        tree = grow(image, self.working_side, self.smoothing)
        kept = self.best(tree, tree.score)
        return [Segment(enlarged(tree.mask(node), image.size), float(tree.score[node])) for node in kept]

    def best(self, tree: Tree, score: np.ndarray, least: float = 0) -> np.ndarray:
        """The regions of a tree that pass the filters and are no duplicates, best first; int [<= max_segments].

        `score` is one for each region of the tree; `least` is the smallest area, as a share of the image.
        """
        area = tree.size / tree.basins.size
        nodes = np.flatnonzero(self.right_size(area) & (area >= least))
        nodes = nodes[np.argsort(-score[nodes], kind="stable")]
        nodes = nodes[self.pass_filters(area[nodes], *tree.extent(nodes))]
        return nodes[suppress(tree.overlaps(nodes), score[nodes], self.max_overlap, self.max_segments)]
