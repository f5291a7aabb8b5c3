"""A segmenter of your own beside the default one: which finds more of the true regions? (docs/howto/own-segmenter.md)

python examples/own_segmenter.py --quick --out out
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from skimage.filters import gaussian, threshold_multiotsu
from skimage.measure import label as connected

from a3tune.commands.label import label
from a3tune.config import load_config
from a3tune.data.phantom import write_phantom
from a3tune.labels.propose import PROPOSERS, Filters
from a3tune.masks import encode_mask
from a3tune.types import Segment


@dataclass(frozen=True, kw_only=True)
class Otsu(Filters):
    """Connected parts of the levels of grey (multi-level Otsu)."""

    name: ClassVar[str] = "otsu"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {**Filters.ranges, "classes": (2, 5)}

    classes: int = 5
    """Levels of grey, 2 to 5."""
    min_area: float = 0.001
    min_side: float = 0.03
    max_frame: float = 0.25

    def __call__(self, image: Image.Image) -> list[Segment]:
        grey = gaussian(np.asarray(image.convert("L"), float), 1.5)
        levels = np.digitize(grey, threshold_multiotsu(grey, self.classes, nbins=64))
        masks = [np.zeros(grey.shape, bool)]
        for level in range(self.classes):
            parts = np.asarray(connected(levels == level, connectivity=1))
            masks += [parts == number for number in range(1, parts.max() + 1)]
        found = np.stack(masks)
        found = found[self.fit(found)]
        scores = found.mean((1, 2))
        return [Segment(encode_mask(found[i]), float(scores[i])) for i in self.distinct(found, scores)]


PROPOSERS["otsu"] = Otsu


def main(out: Path, quick: bool) -> None:
    rows = write_phantom(out / "scans", {"train": 2 if quick else 20})["train"]
    for name in ("superpixels", "otsu"):
        config = load_config(None, [f"data.train={rows}", f"labels.store={out / name}", f"labels.proposer={name}"])
        _, quality = label(config, lambda done, total: None)
        found = quality["all"]
        print(f"{name:12} among the best 4: {found.recall:.2f}   with all segments: {found.ceiling_recall:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything it writes")
    parser.add_argument("--quick", action="store_true", help="few patients")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
